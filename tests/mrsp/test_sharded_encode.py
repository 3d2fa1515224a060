"""Stage 1 on 4 ranks, tensor x context x data parallel, against one process in fp64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megavila.config import LanguageConfig, ModelConfig, ParallelConfig, ProjectorConfig, VisionConfig
from megavila.media import FrameCache, MediaError, SampledVideo, sample_video
from megavila.models import VisionLanguageModel, build_model
from megavila.mrsp.disk import DiskStore
from megavila.mrsp.encode import VideoEncoder, mark_partial_gradients
from megavila.mrsp.shards import ShardedRows
from megavila.mrsp.store import EmbeddingStore
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology, initialize, shutdown
from megavila.training.gradients import GradientBuffer
from tests.distributed import run_ranks
from tests.end_to_end.tiny import COLOURS, write_video

SIDE, HIDDEN, PER_FRAME = 16, 24, 4
FRAMES = (9, 1, 70, 4)
TENSOR_CONTEXT = ((2, 2), (2, 1), (1, 2), (4, 1))
CASES = [
    (tensor, context, pooling, tower, sharded)
    for tensor, context in TENSOR_CONTEXT
    for pooling, tower, sharded in ((1, True, True), (2, True, True), (3, False, True), (1, True, False))
]


def sample(directory: Path) -> list[SampledVideo]:
    videos = []
    for number, frames in enumerate(FRAMES):
        path = directory / f"{number}.mp4"
        if not path.exists():
            write_video(path, list(COLOURS.values())[number % 3], frames=70, seed=number)
        videos.append(sample_video(path, num_frames=frames))
    return videos


def build(topology: Topology, pooling: int, tower: bool) -> VisionLanguageModel:
    config = ModelConfig(
        language=LanguageConfig(
            hidden_size=HIDDEN, num_layers=1, num_heads=4, ffn_hidden_size=16, vocab_size=16
        ),
        vision=VisionConfig(
            hidden_size=8, num_layers=2, num_heads=2, intermediate_size=8, image_size=SIDE, patch_size=4
        ),
        projector=ProjectorConfig(kind="mlp_downsample_2x2_fix", temporal_pooling=pooling),
        dtype="float64",
        init_std=0.2,
        train_vision=tower,
        train_language=False,
    )
    return build_model(config, topology, get_platform("cpu"), seed=5)


def num_rows(pooling: int) -> int:
    return sum(-(-frames // pooling) * PER_FRAME for frames in FRAMES)


def upstream(pooling: int) -> Tensor:
    """Gradient of each row."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(num_rows(pooling), HIDDEN, generator=generator, dtype=torch.float64)


def wanted_by(context_rank: int, context: int, pooling: int) -> Tensor:
    """Rows of a context rank: some of each video, in no order."""
    rows = torch.randperm(num_rows(pooling), generator=torch.Generator().manual_seed(4))
    return rows[context_rank::context]


class Counter:
    """Loads frames through a cache; a video called "bad" breaks off at a frame."""

    def __init__(self) -> None:
        self.cache = FrameCache(1 << 24)

    def __call__(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        if video.fingerprint == "bad" and (stop or 0) > 60:
            raise MediaError(video.path, "frame 60 is damaged")
        return self.cache.load(video, size, start, stop)


def one_case(topology: Topology, videos: list[SampledVideo], case: tuple[Any, ...]) -> dict[str, Any]:
    _, context, pooling, tower, sharded = case
    model = build(topology, pooling, tower)
    if sharded:
        mark_partial_gradients(model, topology)
    buffer = GradientBuffer(model.named_parameters(), topology)
    loader = Counter()
    encoder = VideoEncoder(model, loader, EmbeddingStore(1 << 24), topology, sharded=sharded)
    plain = ShardedRows.join(encoder.encode_or_raise(videos)).whole()
    # In another order, as in a micro-batch: the same ranks have the frames.
    encoder.encode(videos[::-1])
    encoded = encoder.store.counters.frames_encoded
    shard = ShardedRows.join(encoder.encode_or_raise(videos, grad=True))
    wanted = [wanted_by(rank // topology.tensor, context, pooling) for rank in range(topology.mrsp_size)]
    rows = shard.take(wanted)
    mine = wanted[topology.mrsp_rank]
    (rows * upstream(pooling)[mine]).sum().backward()
    buffer.reduce()
    return {
        "plain": plain,
        "rows": rows.detach(),
        "mine": mine,
        "held": len(shard.rows),
        "gradients": {name: gradient.clone() for name, gradient in buffer.named_gradients()},
        "decoded": loader.cache.misses,
        "encoded": encoded,
        "encoded with gradient": encoder.store.counters.frames_encoded - encoded,
        "kept": encoder.store.used_bytes,
        "replica": topology.data_rank,
    }


def on_ranks(rank: int, directory: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    videos = sample(directory)
    for tensor, context in TENSOR_CONTEXT:
        parallel = ParallelConfig(tensor_parallel=tensor, context_parallel=context)
        topology = initialize(parallel, get_platform("cpu"))
        for case in CASES:
            if case[:2] == (tensor, context):
                found[case] = one_case(topology, videos, case)
        if context == 2 and tensor == 2:
            found["errors"] = errors(topology, videos)
            found["disk"] = with_disk(topology, videos, directory)
        parallel_state.destroy_model_parallel()
    return found


def errors(topology: Topology, videos: list[SampledVideo]) -> list[str]:
    """What each rank hears of a video of which one of them meets the damage."""
    bad = replace(videos[2], fingerprint="bad")
    encoder = VideoEncoder(build(topology, 1, True), Counter(), EmbeddingStore(1 << 24), topology)
    found = encoder.encode([videos[0], bad])
    assert isinstance(found[videos[0]], ShardedRows) and encoder.decode([bad, videos[1]]).keys() == {bad}
    return [str(found[bad]), str(len(encoder.store))]


def with_disk(topology: Topology, videos: list[SampledVideo], directory: Path) -> int:
    model = build(topology, 2, False)
    store = EmbeddingStore(0)
    encoder = VideoEncoder(
        model, Counter(), store, topology, disk=DiskStore(directory / "store", store.counters)
    )
    for _ in range(2):
        encoder.encode(videos)
    return store.counters.frames_encoded


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sharded")
    sample(found)
    return found


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[Any, Any]]:
    return run_ranks(on_ranks, 4, directory)


@pytest.fixture(scope="module")
def alone(directory: Path) -> Any:
    """Rows and gradients of one process, frame by frame through the model, by (pooling, tower)."""
    topology = initialize(ParallelConfig(), get_platform("cpu"))
    found: dict[Any, Any] = {}
    for pooling, tower in {case[2:4] for case in CASES}:
        model = build(topology, pooling, tower)
        cache = FrameCache(1 << 24)
        encoded = [model.encode_frames(cache.load(video, (SIDE, SIDE))) for video in sample(directory)]
        rows = torch.cat([model.media_rows(frames) for frames in encoded])
        (rows * upstream(pooling)).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[pooling, tower] = rows.detach(), gradients
    found["topology"] = topology
    yield found
    shutdown()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_and_gradients_are_those_of_one_process(
    ranks: list[dict[Any, Any]], alone: Any, case: tuple[Any, ...]
) -> None:
    tensor, context, pooling, tower, _ = case
    rows, gradients = alone[pooling, tower]
    assert tower == any(name.startswith("vision") for name in gradients)
    for rank in ranks:
        ours = rank[case]
        torch.testing.assert_close(ours["plain"], rows, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours["rows"], rows[ours["mine"]], rtol=1e-10, atol=1e-12)
        assert ours["gradients"].keys() == gradients.keys()
        for name, expected in gradients.items():
            replicas = 4 // (tensor * context)  # each added its own
            error = (ours["gradients"][name] / replicas - expected).norm() / expected.norm()
            assert expected.norm() > 0 and error < 1e-10, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_frame_is_decoded_and_encoded_once(ranks: list[dict[Any, Any]], case: tuple[Any, ...]) -> None:
    tensor, context, pooling, tower, sharded = case
    total, size = sum(FRAMES), tensor * context
    for replica in range(4 // size):
        replica_ranks = [rank[case] for rank in ranks if rank[case]["replica"] == replica]
        counts = {name: [r[name] for r in replica_ranks] for name in ("decoded", "encoded", "held", "kept")}
        copies = 1 if sharded else size
        assert sum(counts["decoded"]) == sum(counts["encoded"]) == copies * total
        assert sum(counts["held"]) == copies * num_rows(pooling)
        # The tower trains: once more, with gradient. It is frozen: its features are there.
        again = sum(r["encoded with gradient"] for r in replica_ranks)
        assert again == (copies * total if tower else 0)
        per_frame = 16 * 8 * 8 if not tower else PER_FRAME * HIDDEN * 8
        units = total if not tower else num_rows(pooling) // PER_FRAME
        assert sum(counts["kept"]) == copies * units * per_frame
        if sharded:
            assert max(counts["encoded"]) - min(counts["encoded"]) <= pooling + len(FRAMES) * (pooling > 1)


def test_damage_that_one_rank_meets_is_known_to_all(ranks: list[dict[Any, Any]]) -> None:
    (heard,) = {tuple(rank["errors"]) for rank in ranks}
    assert "frame 60 is damaged" in heard[0] and heard[1] == "1"


def test_disk_serves_any_number_of_ranks(ranks: list[dict[Any, Any]], alone: Any, directory: Path) -> None:
    assert sum(rank["disk"] for rank in ranks) == sum(FRAMES)  # the second time they came from the disk
    topology = alone["topology"]
    model, store = build(topology, 2, False), EmbeddingStore(1 << 24)
    loader = Counter()
    encoder = VideoEncoder(
        model, loader, store, topology, disk=DiskStore(directory / "store", store.counters)
    )
    rows = ShardedRows.join(encoder.encode_or_raise(sample(directory))).whole()
    assert store.counters.frames_encoded == loader.cache.misses == store.counters.corrupt == 0
    assert store.counters.frames_from_disk == sum(FRAMES)
    torch.testing.assert_close(rows, alone[2, True][0], rtol=1e-10, atol=1e-12)
