"""Which frames of a video are looked at."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import numpy as np

from megavila.config.data import MAX_FRAMES
from megavila.media.fingerprint import fingerprint
from megavila.media.index import VideoIndex, probe
from megavila.runtime.errors import MegavilaError


@dataclass(frozen=True)
class SampledVideo:
    """Frames of one video, chosen but not decoded: cheap, hashable, picklable.

    Attributes:
        path: the file.
        frame_ids: ascending numbers in the order of presentation, without repeats.
        timestamps: seconds of each of them, the video's first frame at 0.
        fingerprint: identity of the file's content.
        duration: seconds of the whole video.
        stream: index among the file's streams; None for its best video stream.
    """

    path: str
    frame_ids: tuple[int, ...]
    timestamps: tuple[float, ...]
    fingerprint: str
    duration: float
    stream: int | None = None

    @property
    def num_frames(self) -> int:
        return len(self.frame_ids)


def sample_video(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    stream: int | None = None,
) -> SampledVideo:
    """Choose frames by count (`num_frames`) or by rate (`fps`, at most `max_frames`); exactly one of the two.

    See `uniform_ids` and `rate_ids` for which frames these are. Raises MediaError for an unreadable file and
    MegavilaError for a contradictory request.
    """
    _validate(num_frames, fps, max_frames)
    index = probe(path, stream)
    if num_frames is not None:
        ids = uniform_ids(index.num_frames, num_frames)
        if num_frames > index.num_frames:
            warnings.warn(
                "a video holds fewer frames than num_frames asks for: each of its frames is used once",
                stacklevel=2,
            )
    else:
        assert fps is not None
        ids = rate_ids(index, fps, MAX_FRAMES if max_frames is None else max_frames)
    times = index.pts_seconds[ids]
    return SampledVideo(
        path=os.fspath(path),
        frame_ids=tuple(ids.tolist()),
        timestamps=tuple(times.tolist()),
        fingerprint=fingerprint(path, stream),
        duration=index.duration,
        stream=stream,
    )


def uniform_ids(total: int, count: int) -> np.ndarray:
    """`count` of `total` frames, evenly by frame number from the first to the last, int64 ascending.

    round(linspace(0, total - 1, count)), halves to even: the frames VILA's own loader takes, so that its checkpoints
    see what they were trained on. One frame is the middle one. `count` >= `total` gives every frame once, never one
    twice.
    """
    if count >= total:
        return np.arange(total, dtype=np.int64)
    if count == 1:
        return np.array([(total - 1) // 2], dtype=np.int64)
    return np.round(np.linspace(0, total - 1, count)).astype(np.int64)


def rate_ids(index: VideoIndex, fps: float, max_frames: int) -> np.ndarray:
    """The frame on show at each of the times 0, 1/fps, 2/fps, … before the video's end, int64 ascending.

    A frame on show at several of these times is taken once. More than `max_frames` are replaced by `max_frames`
    uniform over the video, as a lower rate would.
    """
    # The tolerance, far below a frame, keeps 30/30 from falling before the frame at time 1.0 by rounding.
    times = np.arange(max(1, int(np.ceil(index.duration * fps - 1e-6)))) / fps + 1e-6
    ids = np.unique(np.searchsorted(index.pts_seconds, times, side="right") - 1)
    return uniform_ids(index.num_frames, max_frames) if len(ids) > max_frames else ids


def _validate(num_frames: int | None, fps: float | None, max_frames: int | None) -> None:
    if (num_frames is None) == (fps is None):
        raise MegavilaError(f"set one of num_frames ({num_frames}) and fps ({fps}), not both or neither")
    if fps is None and max_frames is not None:
        raise MegavilaError(f"max_frames={max_frames} limits fps, which is not set; leave it out or set fps")
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise MegavilaError(f"fps={fps} must be a positive number")
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None and not 1 <= value <= MAX_FRAMES:
            raise MegavilaError(f"{name}={value} must be between 1 and {MAX_FRAMES}")
