"""Every frame is decoded and encoded once, counted; stale rows never come back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from megavila.mrsp.encode import encode_prompts, encode_videos
from megavila.mrsp.store import EmbeddingStore, StoreKey, weights_fingerprint
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology

SIDE = 16


class CountingLoader:
    """Frames of a FrameCache, counting those asked for."""

    def __init__(self, limit_bytes: int = 1 << 24) -> None:
        self.cache = FrameCache(limit_bytes)
        self.frames = 0

    def __call__(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        frames = self.cache.load(video, size, start, stop)
        self.frames += len(frames)
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


def by_hand(model: VisionLanguageModel, loader: CountingLoader, videos: list[SampledVideo]) -> Tensor:
    encoded = [model.encode_frames(loader.cache.load(video, (SIDE, SIDE))) for video in videos]
    return torch.cat([model.media_rows(frames) for frames in encoded])


def test_each_frame_is_encoded_once_until_the_weights_change(
    model: VisionLanguageModel, videos: list[SampledVideo]
) -> None:
    loader, store = CountingLoader(), EmbeddingStore(1 << 20)
    rows = encode_videos(model, videos, loader, store, grad=False)
    assert rows.shape == ((3 + 1) * 4, 24)  # pairs of 5 and of 1 frames, 4 rows each
    assert not rows.requires_grad and rows.dtype == model.dtype
    torch.testing.assert_close(rows, by_hand(model, loader, videos), rtol=1e-5, atol=1e-6)
    for _ in range(3):
        assert torch.equal(encode_videos(model, videos, loader, store, grad=False), rows)
    assert (loader.frames, store.counters.frames_encoded) == (6, 6)
    assert (store.counters.hits, store.counters.misses) == (6, 2)
    assert store.used_bytes == rows.nbytes

    with torch.no_grad():
        next(model.projector.parameters()).data[0] += 0.5  # type: ignore[union-attr]
    changed = encode_videos(model, videos, loader, store, grad=False)
    torch.testing.assert_close(changed, by_hand(model, loader, videos), rtol=1e-5, atol=1e-6)
    assert not torch.equal(changed, rows)
    assert (store.counters.stale, store.counters.frames_encoded, len(store)) == (2, 12, 2)
    # Decoded frames survive: new weights are no reason to decode again.
    assert loader.cache.misses == 6


def test_prompts_that_share_a_video_share_its_encoding_with_gradient(
    model: VisionLanguageModel, videos: list[SampledVideo]
) -> None:
    loader, store = CountingLoader(), EmbeddingStore(1 << 20)
    prompts: list[Any] = [
        SimpleNamespace(videos=chosen)
        for chosen in [(videos[0],), (), (videos[1], videos[0]), (videos[0], videos[0])]
    ]
    rows = encode_prompts(model, prompts, loader, store, grad=True)
    assert rows[1] is None
    assert (loader.frames, store.counters.frames_encoded, len(store)) == (6, 6, 0)

    upstream = [None if r is None else torch.randn(r.shape) for r in rows]
    pairs = [(r, g) for r, g in zip(rows, upstream, strict=True) if r is not None and g is not None]
    sum((r * g).sum() for r, g in pairs).backward()  # type: ignore[union-attr]
    shared = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for prompt, (_, gradient) in zip([prompts[0], *prompts[2:]], pairs, strict=True):
        (by_hand(model, loader, list(prompt.videos)) * gradient).sum().backward()
    apart = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert shared.keys() == apart.keys() and any(n.startswith("vision") for n in shared)
    for name, grad in apart.items():
        torch.testing.assert_close(shared[name], grad, rtol=1e-4, atol=1e-5)


def test_frozen_tower_and_projector_use_the_store_in_training_too(
    make_model: Callable[..., VisionLanguageModel], videos: list[SampledVideo]
) -> None:
    model = make_model(train_vision=False, train_projector=False)
    loader, store = CountingLoader(), EmbeddingStore(1 << 20)
    encode_videos(model, videos, loader, store, grad=False)
    rows = encode_videos(model, videos, loader, store, grad=True)
    assert not rows.requires_grad and store.counters.frames_encoded == 6


def test_long_videos_are_loaded_slice_by_slice(
    model: VisionLanguageModel, videos: list[SampledVideo], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, store = CountingLoader(), EmbeddingStore(0)
    monkeypatch.setattr(encode_module, "FRAMES_PER_SLICE", 3)
    rows = encode_videos(model, videos, loader, store, grad=False)
    torch.testing.assert_close(rows, by_hand(model, loader, videos), rtol=1e-5, atol=1e-6)
    assert loader.frames == 6 and len(store) == 0


def test_unreadable_video_raises(
    model: VisionLanguageModel, videos: list[SampledVideo], tmp_path: Path
) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(Path(videos[0].path).read_bytes()[:200])
    with pytest.raises(MediaError):
        encode_videos(
            model, [replace(videos[0], path=str(path))], CountingLoader(), EmbeddingStore(0), grad=False
        )


def test_least_recently_used_rows_leave_first() -> None:
    store = EmbeddingStore(limit_bytes=3 * 40)
    keys = [StoreKey(str(i), (0,), (8, 8), "w") for i in range(4)]
    for i in range(3):
        store.put(keys[i], torch.full((10,), float(i)))
    assert store.get(keys[0]) is not None
    store.put(keys[3], torch.full((10,), 3.0))
    kept = [store.get(key) for key in keys]
    assert kept[1] is None and [float(k[0]) for k in kept if k is not None] == [0.0, 2.0, 3.0]
    assert (store.used_bytes, store.counters.evicted) == (120, 1)
    store.put(keys[1], torch.zeros(31))  # larger than the limit
    assert store.get(keys[1]) is None and len(store) == 3
    store.put(keys[0], torch.zeros(20)[:5])
    assert store.used_bytes == 100


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_fingerprint_sees_a_change_of_any_one_value(name: str) -> None:
    module = torch.nn.Linear(7, 5).bfloat16()
    before = weights_fingerprint([module, None])
    assert weights_fingerprint([module, None]) == before
    parameter = getattr(module, name)
    parameter.data.view(-1)[-1] += 0.01
    assert weights_fingerprint([module, None]) != before
