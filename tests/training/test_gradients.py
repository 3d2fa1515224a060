"""Reduction and clipping over tensor- and data-parallel ranks equal one process that has everything."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from torch import nn

from megavila.config.parallel import ParallelConfig
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import initialize
from megavila.training.gradients import GradientBuffer
from megavila.training.optimizer import MasterAdamW
from tests.distributed import run_ranks

WIDTH, INNER = 6, 10


class Block(nn.Module):
    """norm -> up -> down; the inner width is split over tensor ranks, and the norm's tokens are too."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        up = torch.randn(INNER, WIDTH, generator=generator) / 3
        down = torch.randn(WIDTH, INNER, generator=generator) / 3
        part = slice(rank * INNER // ranks, (rank + 1) * INNER // ranks)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.shift = nn.Parameter(torch.linspace(-0.1, 0.1, WIDTH))
        self.up = nn.Parameter(up[part].clone())
        self.down = nn.Parameter(down[:, part].clone())
        self.rank, self.ranks = rank, ranks
        if ranks > 1:
            self.up.tensor_model_parallel = self.down.tensor_model_parallel = True
            self.scale.sequence_parallel = True

    def loss(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A loss whose gradient of `scale` is this rank's tokens', and that of all else is whole."""
        mine = torch.arange(len(x)) % self.ranks == self.rank
        # The tokens of other ranks reach the sharded weights without a gradient to `scale`.
        scale = torch.where(mine[:, None], self.scale, self.scale.detach())
        normed = x * scale + self.shift
        local = torch.tanh(normed.detach() @ self.up.T) @ self.down.T
        # `shift` and `scale` enter linearly, so that each rank can have its own whole gradient of them.
        return (local * weights).sum() + (normed * weights).sum()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(9, WIDTH, generator=generator), torch.randn(9, WIDTH, generator=generator)


def train(model: Block, topology, rows) -> dict:
    gradients = GradientBuffer(model.named_parameters(), topology, bucket=50)
    optimizer = MasterAdamW(gradients, weight_decay=0.1)
    norms = []
    for step in range(3):
        x, weights = batch(step)
        for micro in rows(torch.arange(len(x))).split(2):
            model.loss(x[micro], weights[micro]).backward()
        gradients.reduce()
        norms.append(gradients.clip(0.7))
        if step == 0:
            first = {name: value.clone() for name, value in gradients.named_gradients()}
        optimizer.step(1e-2)
        gradients.zero()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"norms": norms, "gradients": first, "weights": weights}


def on_two_ranks(rank: int) -> tuple[dict, dict]:
    topology = initialize(ParallelConfig(), get_platform("cpu"))
    # Ranks have different numbers of rows and of micro-batches.
    data = train(Block(0, 1), topology, lambda rows: rows[:3] if topology.data_rank == 0 else rows[3:])
    parallel_state.destroy_model_parallel()
    topology = initialize(ParallelConfig(tensor_parallel=2), get_platform("cpu"))
    return data, train(Block(topology.tensor_rank, 2), topology, lambda rows: rows)


class OneRank:
    def size(self) -> int:
        return 1


@pytest.fixture(scope="module")
def single() -> dict:
    alone = SimpleNamespace(tensor_group=OneRank(), data_context_group=OneRank())
    return train(Block(0, 1), alone, lambda rows: rows)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[dict, dict]]:
    """For each of two ranks: the result of data parallel 2, and that of tensor parallel 2."""
    return run_ranks(on_two_ranks, 2)


def test_data_parallel(single, two_ranks):
    for result, _ in two_ranks:
        assert result["norms"] == pytest.approx(single["norms"], rel=1e-5)
        for kind in ("gradients", "weights"):
            for name, value in result[kind].items():
                torch.testing.assert_close(
                    value, single[kind][name], rtol=1e-4, atol=1e-6, msg=f"{kind} of {name} differ"
                )


def test_tensor_parallel(single, two_ranks):
    first, second = (tensor for _, tensor in two_ranks)
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(single["norms"], rel=1e-5)
    for kind in ("gradients", "weights"):
        for name, dimension in (("scale", None), ("shift", None), ("up", 0), ("down", 1)):
            parts = [first[kind][name], second[kind][name]]
            whole = parts[0] if dimension is None else torch.cat(parts, dimension)
            if dimension is None:
                assert torch.equal(*parts)
            torch.testing.assert_close(
                whole, single[kind][name], rtol=1e-4, atol=1e-6, msg=f"{kind} of {name} differ"
            )
