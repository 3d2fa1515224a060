"""Every frame is decoded and encoded once, counted; stale rows never come back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from megavila.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavila.media import FrameCache, MediaError, SampledVideo, sample_video
from megavila.models import VisionLanguageModel, build_model
from megavila.mrsp import encode as encode_module
from megavila.mrsp import store as store_module
from megavila.mrsp.encode import VideoEncoder
from megavila.mrsp.shards import ShardedRows
from megavila.mrsp.store import EmbeddingStore, Kept, StoreKey, weights_fingerprint
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology

SIDE = 16


class CountingLoader:
    """Frames of a FrameCache, counting those asked for."""

    def __init__(self, limit_bytes: int = 1 << 24) -> None:
        self.cache = FrameCache(limit_bytes)
        self.frames = self.largest = 0

    def __call__(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        frames = self.cache.load(video, size, start, stop)
        self.frames += len(frames)
        self.largest = max(self.largest, len(frames))
        return frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[SampledVideo]:
    """Two small H.264 files; 5 and 1 frames are looked at."""
    directory = tmp_path_factory.mktemp("videos")
    return [
        sample_video(write_video(directory / f"{i}.mp4", seed=i), num_frames=n) for i, n in enumerate([5, 1])
    ]


def write_video(path: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(12):
            image = np.repeat(np.repeat(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8), 8, 0), 8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def make_model(topology: Topology) -> Callable[..., VisionLanguageModel]:
    def make(**changes: Any) -> VisionLanguageModel:
        config = ModelConfig(
            language=LanguageConfig(
                hidden_size=24, num_layers=1, num_heads=2, ffn_hidden_size=16, vocab_size=11
            ),
            vision=VisionConfig(
                hidden_size=8, num_layers=2, num_heads=2, intermediate_size=8, image_size=SIDE, patch_size=4
            ),
            projector=ProjectorConfig(kind="mlp_downsample_2x2_fix", temporal_pooling=2),
            dtype="float32",
        )
        return build_model(replace(config, **changes), topology, get_platform("cpu"))

    return make


@pytest.fixture
def model(make_model: Callable[..., VisionLanguageModel]) -> VisionLanguageModel:
    return make_model(train_vision=True)


def make_encoder(model: VisionLanguageModel, loader: CountingLoader, **options: Any) -> VideoEncoder:
    store = EmbeddingStore(options.pop("limit_bytes", 1 << 20))
    return VideoEncoder(model, loader, store, model.language.topology, **options)


def encode(encoder: VideoEncoder, videos: list[SampledVideo], **options: Any) -> Tensor:
    return ShardedRows.join(encoder.encode_or_raise(videos, **options)).whole()


def by_hand(model: VisionLanguageModel, loader: CountingLoader, videos: list[SampledVideo]) -> Tensor:
    encoded = [model.encode_frames(loader.cache.load(video, (SIDE, SIDE))) for video in videos]
    return torch.cat([model.media_rows(frames) for frames in encoded])


def test_each_frame_is_encoded_once_until_the_weights_change(
    model: VisionLanguageModel, videos: list[SampledVideo]
) -> None:
    loader = CountingLoader()
    encoder = make_encoder(model, loader)
    store = encoder.store
    rows = encode(encoder, videos)
    assert rows.shape == ((3 + 1) * 4, 24)  # pairs of 5 and of 1 frames, 4 rows each
    assert not rows.requires_grad and rows.dtype == model.dtype
    torch.testing.assert_close(rows, by_hand(model, loader, videos), rtol=1e-5, atol=1e-6)
    for _ in range(3):
        assert torch.equal(encode(encoder, videos), rows)
    assert (loader.frames, store.counters.frames_encoded) == (6, 6)
    assert (store.counters.hits, store.counters.misses) == (6, 2)
    assert store.used_bytes == rows.nbytes

    with torch.no_grad():
        next(model.projector.parameters()).data[0] += 0.5  # type: ignore[union-attr]
    changed = encode(encoder, videos)
    torch.testing.assert_close(changed, by_hand(model, loader, videos), rtol=1e-5, atol=1e-6)
    assert not torch.equal(changed, rows)
    assert (store.counters.stale, store.counters.frames_encoded, len(store)) == (2, 12, 2)
    # Decoded frames survive: new weights are no reason to decode again.
    assert loader.cache.misses == 6
    # Nor is what is not to be kept looked up.
    encode(encoder, videos, keep=False)
    assert store.counters.frames_encoded == 18 and store.counters.hits == 6


def test_prompts_that_share_a_video_share_its_encoding_with_gradient(
    model: VisionLanguageModel, videos: list[SampledVideo]
) -> None:
    loader = CountingLoader()
    encoder = make_encoder(model, loader)
    prompts = [[videos[0]], [videos[1], videos[0]], [videos[0], videos[0]]]
    found = encoder.encode([video for chosen in prompts for video in chosen], grad=True)
    rows = [torch.cat([found[video].rows for video in chosen]) for chosen in prompts]  # type: ignore[union-attr]
    assert (loader.frames, encoder.store.counters.frames_encoded, len(encoder.store)) == (6, 6, 0)

    upstream = [torch.randn(r.shape) for r in rows]
    sum((r * g).sum() for r, g in zip(rows, upstream, strict=True)).backward()  # type: ignore[union-attr]
    shared = gradients(model)
    for chosen, gradient in zip(prompts, upstream, strict=True):
        (by_hand(model, loader, chosen) * gradient).sum().backward()
    assert_same_gradients(shared, gradients(model))
    assert any(name.startswith("vision") for name in shared)


def gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    """All gradients, taken away from the parameters."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys() and ours
    for name, gradient in expected.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_frozen_tower_runs_once_while_the_projector_trains(
    make_model: Callable[..., VisionLanguageModel], videos: list[SampledVideo]
) -> None:
    model = make_model(train_vision=False, train_projector=True)
    loader = CountingLoader()
    encoder = make_encoder(model, loader)
    upstream = torch.randn(16, 24)
    for step in range(3):
        plain = encode(encoder, videos)
        rows = encode(encoder, videos, grad=True)
        assert torch.equal(rows, plain) and not plain.requires_grad
        (rows * upstream).sum().backward()
        ours = gradients(model)
        expected = by_hand(model, loader, videos)
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
        (expected * upstream).sum().backward()
        assert_same_gradients(ours, gradients(model))
        assert encoder.store.counters.frames_encoded == loader.frames == 6, step
        with torch.no_grad():
            next(model.projector.parameters()).add_(0.1)  # type: ignore[union-attr]
    features = 6 * model.vision.num_patches * 8  # type: ignore[union-attr]
    assert encoder.store.used_bytes == 4 * features and encoder.store.counters.stale == 0


def test_frozen_tower_and_projector_use_the_store_in_training_too(
    make_model: Callable[..., VisionLanguageModel], videos: list[SampledVideo]
) -> None:
    encoder = make_encoder(make_model(train_vision=False, train_projector=False), CountingLoader())
    encode(encoder, videos)
    rows = encode(encoder, videos, grad=True)
    assert not rows.requires_grad and encoder.store.counters.frames_encoded == 6


def test_bf16_storage_rounds_in_every_pass_alike(
    make_model: Callable[..., VisionLanguageModel], videos: list[SampledVideo]
) -> None:
    model = make_model(train_vision=False, train_projector=False)
    loader = CountingLoader()
    encoder = make_encoder(model, loader, store_dtype=torch.bfloat16)
    rows = encode(encoder, videos)
    assert rows.dtype == torch.float32 and encoder.store.used_bytes == 2 * rows.numel()
    assert torch.equal(rows, by_hand(model, loader, videos).bfloat16().float())
    assert torch.equal(encode(encoder, videos), rows)


def test_long_videos_are_loaded_slice_by_slice(
    model: VisionLanguageModel, videos: list[SampledVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = CountingLoader()
    encoder = make_encoder(model, loader, limit_bytes=0)
    monkeypatch.setattr(encode_module, "FRAMES_PER_SLICE", 3)
    rows = encode(encoder, videos)
    torch.testing.assert_close(rows, by_hand(model, loader, videos), rtol=1e-5, atol=1e-6)
    assert loader.frames == 6 and loader.largest == 2 and len(encoder.store) == 0


def test_unreadable_video_is_named_and_others_are_encoded(
    model: VisionLanguageModel, videos: list[SampledVideo], tmp_path: Path
) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(Path(videos[0].path).read_bytes()[:200])
    cut = replace(videos[0], path=str(path), fingerprint="cut")
    encoder = make_encoder(model, CountingLoader())
    with pytest.raises(MediaError):
        encoder.encode_or_raise([videos[1], cut])
    found = encoder.encode([videos[1], cut])
    assert isinstance(found[cut], MediaError) and isinstance(found[videos[1]], ShardedRows)
    assert encoder.decode([cut, videos[0]]).keys() == {cut}


def kept(rows: Tensor) -> Kept:
    return Kept(((0, len(rows)),), rows, (rows.nbytes,))


def test_least_recently_used_rows_leave_first(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(store_module._log, "warning", warnings.append)
    store = EmbeddingStore(limit_bytes=3 * 40)
    keys = [StoreKey(str(i), (0,), "8", "w") for i in range(4)]
    for i in range(3):
        store.put(keys[i], kept(torch.full((10,), float(i))))
    assert store.get(keys[0]) is not None and not warnings
    store.put(keys[3], kept(torch.full((10,), 3.0)))
    found = [store.get(key) for key in keys]
    assert found[1] is None and [float(k.rows[0]) for k in found if k is not None] == [0.0, 2.0, 3.0]
    assert (store.used_bytes, store.counters.evicted) == (120, 1)
    store.put(keys[1], kept(torch.zeros(31)))  # larger than the limit
    assert store.get(keys[1]) is None and len(store) == 3 and store.counters.evicted == 2
    store.put(keys[0], kept(torch.zeros(20)[:5]))
    assert store.used_bytes == 100
    assert len(warnings) == 1 and "raise mrsp.store_gib" in warnings[0]


def test_a_video_leaves_every_rank_when_one_is_full() -> None:
    """This rank has room; the other one, with the larger slices, has not."""
    store = EmbeddingStore(limit_bytes=100)
    keys = [StoreKey(str(i), (0,), "8", "w") for i in range(3)]
    for key in keys:
        store.put(key, Kept(((0, 1), (1, 6)), torch.zeros(1, 2), (8, 40)))
    assert [store.get(key) is None for key in keys] == [True, False, False]
    assert store.used_bytes == 16


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_fingerprint_sees_a_change_of_any_one_value(name: str) -> None:
    module = torch.nn.Linear(7, 5).bfloat16()
    before = weights_fingerprint([module, None])
    assert weights_fingerprint([module, None]) == before
    parameter = getattr(module, name)
    parameter.data.view(-1)[-1] += 0.01
    assert weights_fingerprint([module, None]) != before
