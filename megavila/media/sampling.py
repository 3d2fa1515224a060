"""Which frames of a video are looked at."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import numpy as np

from megavila.config.data import MAX_FRAMES
from megavila.media.errors import MediaError
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
    start: float | None = None,
    end: float | None = None,
    stream: int | None = None,
) -> SampledVideo:
    """Choose frames by count (`num_frames`) or by rate (`fps`, at most `max_frames`); exactly one of the two.

    `start` and `end` (seconds) leave only the frames shown in [start, end) to choose from; timestamps stay those of
    the whole video. See `uniform_ids` and `rate_ids` for which frames these are. Raises MediaError for an unreadable
    file and for a clip without a frame, and MegavilaError for a contradictory request.
    """
    _validate(num_frames, fps, max_frames)
    index = probe(path, stream)
    first, total = _clip(index, start, end)
    if num_frames is not None:
        ids = first + uniform_ids(total, num_frames)
        if num_frames > total:
            warnings.warn(
                "a video or clip holds fewer frames than num_frames asks for: each of its frames is used once",
                stacklevel=2,
            )
    else:
        assert fps is not None
        ids = rate_ids(index, fps, MAX_FRAMES if max_frames is None else max_frames, first, total)
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


def rate_ids(
    index: VideoIndex, fps: float, max_frames: int, first: int = 0, total: int | None = None
) -> np.ndarray:
    """The frame on show at each of the times 0, 1/fps, 2/fps, … before the video's end, int64 ascending.

    A frame on show at several of these times is taken once. More than `max_frames` are replaced by `max_frames`
    uniform over the video, as a lower rate would. `first` and `total` restrict all this to a clip of the frames
    [first, first + total), whose first frame is at time 0.
    """
    total = index.num_frames - first if total is None else total
    times = index.pts_seconds[first : first + total] - index.pts_seconds[first]
    whole = first + total == index.num_frames
    end = index.duration if whole else float(index.pts_seconds[first + total])
    length = end - float(index.pts_seconds[first])
    # The tolerance, far below a frame, keeps 30/30 from falling before the frame at time 1.0 by rounding.
    wanted = np.arange(max(1, int(np.ceil(length * fps - 1e-6)))) / fps + 1e-6
    ids = np.unique(np.searchsorted(times, wanted, side="right") - 1)
    return first + (uniform_ids(total, max_frames) if len(ids) > max_frames else ids)


def _clip(index: VideoIndex, start: float | None, end: float | None) -> tuple[int, int]:
    """First frame and number of frames shown in [start, end) seconds."""
    if start is None and end is None:
        return 0, index.num_frames
    low = 0.0 if start is None else start
    high = index.duration if end is None else end
    if not 0 <= low < high:
        raise MegavilaError(f"{index.path}: clip [{low}, {high}) s; it needs 0 <= start < end")
    first, stop = np.searchsorted(index.pts_seconds, [low - 1e-6, high - 1e-6], side="left").tolist()
    if first == stop:
        raise MediaError(
            index.path, f"no frame is shown in [{low}, {high}) s; the video lasts {index.duration:.3f} s"
        )
    return first, stop - first


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
