"""Small videos of every awkward kind, encoded for the tests of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Clip:
    """How one test video is encoded."""

    name: str
    codec: str
    frames: int = 75
    size: tuple[int, int] = (48, 64)
    gop: int = 12
    bframes: int = 0
    options: dict[str, str] = field(default_factory=dict)
    rotation: int = 0
    pts: Sequence[int] | None = None  # in 1/1000 s; None: 25 frames a second


def write_clip(path: Path, clip: Clip) -> Path:
    """Encode moving noise, every frame different from every other."""
    rng = np.random.default_rng(clip.frames)
    height, width = clip.size
    base = rng.integers(0, 255, (height + clip.frames, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(clip.codec, rate=25, options=clip.options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if clip.codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = clip.gop
        stream.codec_context.max_b_frames = clip.bframes
        stream.thread_count = 1
        if clip.rotation:
            stream.set_display_rotation(clip.rotation)
        if clip.pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(clip.frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(base[number : number + height]))
            if clip.pts is not None:
                frame.pts, frame.time_base = clip.pts[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


X264_OPEN_GOP = {"x264-params": "open-gop=1:b-pyramid=normal:scenecut=0:ref=4", "preset": "medium"}

CLIPS = (
    Clip("open_gop.mp4", "libx264", bframes=3, options=X264_OPEN_GOP),
    Clip("open_gop.mkv", "libx264", bframes=3, options=X264_OPEN_GOP),
    Clip("open_gop.ts", "libx264", bframes=3, options=X264_OPEN_GOP),
    Clip("closed_gop.mp4", "libx264", bframes=2, frames=61, size=(50, 70)),
    Clip("intra_refresh.mp4", "libx264", options={"x264-params": "intra-refresh=1:keyint=10"}),
    Clip(
        "hevc.mp4",
        "libx265",
        bframes=3,
        frames=50,
        options={"x265-params": "log-level=none:open-gop=1:keyint=10"},
    ),
    Clip("mpeg4.mp4", "mpeg4", bframes=2),
    Clip("mpeg4.avi", "mpeg4", bframes=2),
    Clip("mpeg2.mpg", "mpeg2video", bframes=2),
    Clip(
        "vp8_hidden.webm", "libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "good"}
    ),
    Clip("vp9.webm", "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    Clip("mjpeg.avi", "mjpeg", frames=20),
    Clip("raw.h264", "libx264", bframes=2, frames=30),
    Clip("rotated_90.mp4", "libx264", frames=20, size=(48, 80), rotation=90),
    Clip("rotated_180.mp4", "libx264", frames=20, rotation=180),
    Clip("rotated_270.mp4", "libx264", frames=20, size=(48, 80), rotation=-90),
    Clip("variable_rate.mkv", "libx264", bframes=2, frames=40, pts=[i * i + 20 * i for i in range(40)]),
)


@pytest.fixture(params=CLIPS, ids=lambda clip: clip.name)
def clip(request: pytest.FixtureRequest) -> Clip:
    """Each clip in turn."""
    return request.param


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the path of a clip of CLIPS by name, encoding it on first use."""
    folder = tmp_path_factory.mktemp("clips")
    by_name = {clip.name: clip for clip in CLIPS}

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_clip(path, by_name[name])

    return get


@pytest.fixture(scope="session")
def encode() -> Callable[..., Path]:
    """`encode(path, codec=…, frames=…, …)`: write one clip, by the fields of Clip."""

    def write(path: Path, **settings: Any) -> Path:
        return write_clip(path, Clip(name=path.name, **settings))

    return write


@pytest.fixture(scope="session")
def decode_everything() -> Callable[..., tuple[list[int | None], torch.Tensor]]:
    """The reference: `decode_everything(path, stream=None)` -> ticks of every frame, uint8 (n, 3, h, w), upright."""
    return _decode_everything


def _decode_everything(path: Path, stream: int | None = None) -> tuple[list[int | None], torch.Tensor]:
    ticks: list[int | None] = []
    images: list[np.ndarray] = []
    with av.open(str(path)) as container:
        video = container.streams.best("video") if stream is None else container.streams[stream]
        for frame in container.decode(video):
            ticks.append(frame.pts)
            images.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).copy())
    return ticks, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
