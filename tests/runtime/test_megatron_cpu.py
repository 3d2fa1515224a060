"""A small Megatron GPTModel runs on gloo: tensor + sequence parallel equals one rank, with recomputation too."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn

from megavila.config import ParallelConfig
from megavila.runtime import megatron_cpu
from megavila.runtime.collectives import all_reduce_sum
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import Platform, get_platform
from megavila.runtime.seeds import load_rng_state, rng_state, seed_everything
from megavila.runtime.topology import Topology, initialize, shutdown
from tests.distributed import run_ranks


class RmsNorm(nn.Module):
    """Megatron's own refuses sequence parallel without TransformerEngine."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _model(topology: Topology, *, recompute: bool, dropout: float) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=topology.tensor,
        sequence_parallel=topology.sequence_parallel,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=dropout,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RmsNorm
    layers = TransformerBlockSubmodules(layer_specs=[layer] * 2, layer_norm=RmsNorm)
    return GPTModel(config, layers, vocab_size=46, max_sequence_length=64, position_embedding_type="rope")


def _loss_and_gradients(
    rank: int, tensor: int, recompute: bool, dropout: float = 0.0
) -> dict[str, torch.Tensor]:
    topology = initialize(ParallelConfig(tensor_parallel=tensor), get_platform("cpu"))
    seed_everything(3, topology)
    model = _model(topology, recompute=recompute, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 46, (2, 10), generator=generator)
    positions = torch.arange(10)[None].expand(2, -1)
    causal = torch.triu(torch.ones(10, 10, dtype=torch.bool), 1)[None, None]
    loss = model(ids, positions, causal, labels=ids.roll(-1, 1))  # (2, 10)
    loss.backward(torch.randn(loss.shape, generator=generator))
    out = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if getattr(parameter, "tensor_model_parallel", False):  # split: compare the whole matrix's norm
            out[name] = all_reduce_sum(gradient.square().sum(), topology.tensor_group)
        elif topology.sequence_parallel:  # whole weights that saw a slice of the tokens each
            out[name] = all_reduce_sum(gradient, topology.tensor_group)
        else:
            out[name] = gradient
    parallel_state.destroy_model_parallel()
    return out


def _on_two_ranks(
    rank: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float], list[float]]:
    plain = _loss_and_gradients(rank, 2, recompute=False)
    recomputed = _loss_and_gradients(rank, 2, recompute=True)
    topology = initialize(ParallelConfig(tensor_parallel=2), get_platform("cpu"))
    seed_everything(5, topology)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    return plain, recomputed, torch.rand(3).tolist(), inside


def test_two_ranks() -> None:
    one = _loss_and_gradients(0, 1, recompute=False)
    ranks = run_ranks(_on_two_ranks, 2)
    # Tensor and sequence parallel, with and without recomputation, equals one rank.
    for split in [r[0] for r in ranks] + [r[1] for r in ranks]:
        assert split.keys() == one.keys() and len(one) == 18
        for name, expected in one.items():
            error = (split[name] - expected).norm() / expected.norm()
            assert error < 1e-5, f"{name}: relative error {error:.1e}"
    # The default random stream is shared, the model-parallel stream is each rank's own.
    assert ranks[0][2] == ranks[1][2]
    assert ranks[0][3] != ranks[1][3]
    assert ranks[0][2] != ranks[0][3]


def test_recomputation_repeats_dropout_masks() -> None:
    plain = _loss_and_gradients(0, 1, recompute=False, dropout=0.3)
    again = _loss_and_gradients(0, 1, recompute=True, dropout=0.3)
    without = _loss_and_gradients(0, 1, recompute=False, dropout=0.0)
    assert not torch.equal(plain["loss"], without["loss"])
    for name, expected in plain.items():
        assert torch.equal(again[name], expected), name


def test_fork_leaves_the_outer_stream_alone_and_goes_on_inside() -> None:
    seed_everything(5, initialize(ParallelConfig(), get_platform("cpu")))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    state = rng_state()
    expected_outer = torch.rand(2)
    load_rng_state(state)
    with tracker.fork():
        first = torch.rand(2)
        with tracker.fork("data-parallel-rng"):
            nested = torch.rand(2)
        second = torch.rand(2)
    assert torch.equal(torch.rand(2), expected_outer)
    load_rng_state(state)
    with tracker.fork():
        assert torch.equal(torch.rand(4), torch.cat([first, second]))
    with tracker.fork("data-parallel-rng"):
        assert torch.equal(torch.rand(2), nested)
    with pytest.raises(RuntimeError, match="inside"), tracker.fork():
        raise RuntimeError("inside")
    with pytest.raises(MegavilaError, match="'other' is not there"), tracker.fork("other"):
        pass
    shutdown()


def test_patches_are_applied_once_and_only_for_the_cpu() -> None:
    megatron_cpu.apply()
    tracker_before = tensor_parallel.get_cuda_rng_tracker()
    megatron_cpu.apply()
    assert tensor_parallel.get_cuda_rng_tracker() is tracker_before
    assert torch.cuda.current_device() == torch.device("cpu")
    with pytest.raises(MegavilaError, match="start a new one for CUDA"):
        initialize(ParallelConfig(), Platform("cuda"))
