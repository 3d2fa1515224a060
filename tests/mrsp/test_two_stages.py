"""Both stages on 4 ranks, frames and tokens split: log-probs and gradients of one process, in fp64."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megavila.config import ParallelConfig
from megavila.media import SampledVideo
from megavila.models import VisionLanguageModel, export_hf, load_hf
from megavila.mrsp.encode import VideoEncoder, mark_partial_gradients
from megavila.mrsp.layout import LayoutKind, build_layout
from megavila.mrsp.logprobs import response_logprobs
from megavila.mrsp.shards import ShardedRows, join_shards
from megavila.mrsp.store import EmbeddingStore
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import seed_everything
from megavila.runtime.topology import Topology, initialize
from megavila.training.gradients import GradientBuffer
from tests.distributed import run_ranks
from tests.mrsp.steps import TEMPERATURE, Step, build, encode, make_step

WORLD = 4
DEGREES: dict[str, dict[str, Any]] = {
    "context 2": {"context_parallel": 2, "cp_split": "always"},
    "context 4": {"context_parallel": 4, "cp_split": "always", "cp_comm_type": "a2a+p2p", "cp_ulysses": 2},
    "tensor 2": {"tensor_parallel": 2, "sequence_parallel": True},
    "tensor 2, whole sequences": {"tensor_parallel": 2, "sequence_parallel": False},
    "context 2 x tensor 2": {"context_parallel": 2, "cp_split": "always", "tensor_parallel": 2},
}
CASES: list[tuple[str, LayoutKind]] = [
    ("mixed", "shared_prefix"),
    ("two videos", "repeated"),
    ("short text", "shared_prefix"),
    ("long", "shared_prefix"),
]


def videos_of(step: Step) -> tuple[list[tuple[SampledVideo, ...]], dict[str, Tensor]]:
    """Each prompt's frames as one video, and the pixels of each."""
    videos, pixels = [], {}
    for number, frames in enumerate(step.frames):
        if frames is None:
            videos.append(())
            continue
        name, ids = f"video{number}", tuple(range(len(frames)))
        pixels[name] = frames
        videos.append((SampledVideo(name, ids, tuple(map(float, ids)), name, 9.0),))
    return videos, pixels


def replicated_gradients(model: VisionLanguageModel, topology: Topology) -> GradientBuffer:
    """Of the parameters that every tensor-parallel rank has whole: tower, projector and norms."""
    named = [(n, p) for n, p in model.named_parameters() if not getattr(p, "tensor_model_parallel", False)]
    return GradientBuffer(named, topology)


def run(model: VisionLanguageModel, case: str, kind: LayoutKind) -> dict[str, Any]:
    step, topology = make_step(case), model.language.topology
    buffer = replicated_gradients(model, topology)
    layout = build_layout(step.groups, kind)
    fetched: list[int] = []
    if topology.mrsp_size == 1:
        rows: Any = encode(model, step)
    else:
        videos, pixels = videos_of(step)

        def load(
            video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
        ) -> Tensor:
            return pixels[video.path][start:stop]

        encoder = VideoEncoder(model, load, EmbeddingStore(0), topology)
        found = [encoder.encode_or_raise(chosen, grad=True) for chosen in videos]
        rows = [join_shards(parts) for parts in found]
        take = ShardedRows.take
        ShardedRows.take = lambda *args: fetched.append(len(result := take(*args))) or result  # type: ignore
    try:
        logprobs = response_logprobs(model, layout, rows, temperature=TEMPERATURE)
    finally:
        if topology.mrsp_size > 1:
            ShardedRows.take = take
    (logprobs * step.upstream).sum().backward()
    buffer.reduce()
    gradients = {n: g / topology.data for n, g in buffer.named_gradients()}
    for parameter in model.parameters():
        parameter.grad = None
    return {
        "logprobs": logprobs.detach(),
        "gradients": gradients,
        "fetched": fetched,
        "rows": layout.num_media_rows,
        "context": topology.context,
    }


def on_ranks(rank: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    results = {}
    for name, settings in DEGREES.items():
        topology = initialize(ParallelConfig(**settings), get_platform("cpu"))
        seed_everything(0, topology)
        for case in CASES:
            model = build(topology, "float64")
            load_hf(model, weights)
            mark_partial_gradients(model, topology)
            results[name, case] = run(model, *case)
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def weights(topology: Topology) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf(build(topology, "float64"))}


@pytest.fixture(scope="module")
def ranks(weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    return run_ranks(on_ranks, WORLD, weights)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", DEGREES)
def test_equals_one_process(
    ranks: list[dict[str, Any]],
    weights: dict[str, Tensor],
    topology: Topology,
    name: str,
    case: tuple[str, LayoutKind],
) -> None:
    model = build(topology, "float64")
    load_hf(model, weights)
    expected = run(model, *case)
    whole = torch.stack([g.norm() for g in expected["gradients"].values()]).norm()
    for rank in ranks:
        ours = rank[name, case]
        torch.testing.assert_close(ours["logprobs"], expected["logprobs"], rtol=1e-9, atol=1e-9)
        assert ours["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            error = (ours["gradients"][parameter] - gradient).norm() / gradient.norm().clamp_min(1e-3 * whole)
            assert error < 1e-9, f"{parameter}: {error:.1e}"
    if case[0] != "short text":
        assert any(n.startswith("vision") and g.norm() > 0 for n, g in expected["gradients"].items())


def test_no_rank_holds_all_media_rows(ranks: list[dict[str, Any]]) -> None:
    for (name, case), ours in ranks[0].items():
        if ours["context"] > 1 and case[0] == "two videos":
            others = [rank[name, case]["fetched"] for rank in ranks]
            assert all(len(fetched) == 1 and fetched[0] < ours["rows"] for fetched in others), (name, others)
