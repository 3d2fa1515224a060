"""Which packets must be decoded for the frames that are wanted.

A *run* starts at a random-access point and ends at the last wanted packet that depends on no later point. Runs share
no decoder state, so they are decoded in parallel, and a slice of a video's frames costs a slice of its decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megavila.media.index import VideoIndex

# When frames of a run do not come out, how many random-access points further back to try next.
RETRY_DISTANCES = (1, 4, 16)


@dataclass(frozen=True)
class Run:
    """Packets `start` to `stop` inclusive, as decode positions, for `frames` (frame ids, ascending)."""

    start: int
    stop: int
    frames: tuple[int, ...]


def plan_runs(index: VideoIndex, frame_ids: Iterable[int], back: int = 0) -> list[Run]:
    """Group `frame_ids` into runs, in decode order; each starts `back` random-access points before the nearest one.

    The nearest usable point of a frame is the last one that is neither decoded nor shown after it: frames decoded
    after an open-GOP point but shown before it lean on the group of pictures before.
    """
    wanted = sorted(set(frame_ids))
    if not wanted:
        return []
    if not index.timed:
        return [Run(0, int(index.positions[wanted[-1]]), tuple(wanted))]
    starts: dict[int, list[int]] = {}
    for frame, point in zip(wanted, _nearest_points(index, wanted), strict=True):
        starts.setdefault(max(0, point - back), []).append(frame)
    return [
        Run(int(index.random_access[point]), int(index.positions[frames].max()), tuple(frames))
        for point, frames in sorted(starts.items())
    ]


def _nearest_points(index: VideoIndex, frames: Sequence[int]) -> list[int]:
    """For each frame the ordinal of the random-access point from which to decode it."""
    points = index.random_access
    point_pts = index.packet_pts[points]
    nearest = np.searchsorted(points, index.positions[list(frames)], side="right") - 1
    result: list[int] = []
    for frame, point in zip(frames, nearest.tolist(), strict=True):
        while point > 0 and point_pts[point] > index.pts[frame]:
            point -= 1
        result.append(point)
    return result
