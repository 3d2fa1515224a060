"""What a video file holds, found by demultiplexing alone: times, decode order, random-access points."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from megavila.media.container import media_errors, open_video
from megavila.media.errors import MediaError
from megavila.runtime.logging import get_logger

_log = get_logger(__name__)

# Containers that number frames before writing them; a demultiplexed count below this share of it is a cut file.
_COMPLETE_SHARE = 0.99

_Key = tuple[str, int, int, int | None]
"""Path, size, modification time and stream."""


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """One video stream of one file, frames numbered in the order they are shown.

    A file is *timed* when every packet has its own presentation time: then a frame is known by its time, and any run
    of frames can be decoded alone. Otherwise (AVI with B-frames, raw elementary streams, repeated times) frames are
    known only by counting decoder output from the start.
    """

    path: str
    stream: int  # index among all streams of the file
    codec: str
    width: int  # coded pixels, before rotation
    height: int
    rotation: int  # degrees counterclockwise that bring a decoded frame upright; a multiple of 90
    pixel_format: str
    colorspace: int  # FFmpeg's AVCOL_SPC_*; 2 = unspecified
    time_base: Fraction  # seconds a tick
    timed: bool
    pts: np.ndarray  # (frames,) int64 ticks, ascending
    positions: np.ndarray  # (frames,) int64 decode position of the packet of each frame
    corrupt: np.ndarray  # (frames,) bool: the demuxer found the frame's packet cut or damaged
    random_access: np.ndarray  # (points,) int64 decode positions, ascending; the first packet is always one
    packet_pts: np.ndarray  # (packets,) int64 ticks in decode order
    packet_dts: np.ndarray  # (packets,) int64 ticks in decode order
    last_duration: int  # ticks the last frame is shown
    declared_frames: int  # the container's own count; 0 when it states none

    @property
    def num_frames(self) -> int:
        return len(self.pts)

    @cached_property
    def pts_seconds(self) -> np.ndarray:
        """(frames,) float64 presentation times in seconds, the first frame at 0."""
        return (
            (self.pts - self.pts[0]).astype(np.float64)
            * self.time_base.numerator
            / self.time_base.denominator
        )

    @property
    def duration(self) -> float:
        """Seconds from the first frame's appearance to the end of the last."""
        return float((int(self.pts[-1]) - int(self.pts[0]) + self.last_duration) * self.time_base)

    @property
    def truncated(self) -> bool:
        """True when the container declares clearly more frames than its data holds."""
        return self.timed and self.num_frames < _COMPLETE_SHARE * self.declared_frames

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, and roughly of what is derived from them."""
        arrays = (
            self.pts,
            self.positions,
            self.corrupt,
            self.random_access,
            self.packet_pts,
            self.packet_dts,
        )
        return 4096 + 4 * sum(array.nbytes for array in arrays)

    @cached_property
    def position_of_pts(self) -> dict[int, int]:
        """Decode position of the packet with a given time; of use in timed files only."""
        return {pts: position for position, pts in enumerate(self.packet_pts.tolist())}


def probe(path: str | os.PathLike[str], stream: int | None = None) -> VideoIndex:
    """Index a video by demultiplexing it; only the first frame is decoded (nothing else tells the rotation).

    Remembered in memory by path, size and modification time. `stream` is an index among all streams of the file;
    by default the best video stream. Raises MediaError.
    """
    name = os.fspath(path)
    try:
        stat = os.stat(name)
    except OSError as error:
        raise MediaError(
            name, "no such file" if isinstance(error, FileNotFoundError) else str(error)
        ) from error
    key = (name, stat.st_size, stat.st_mtime_ns, stream)  # a rewritten file is read again
    index = _remembered.get(key)
    if index is None:
        index = _probe(name, stream)
        _remembered.put(key, index)
    return index


class _Remembered:
    """Indexes by file, the least recently used leaving first. An hour's index takes 3 MB, a short clip's next to none."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._indexes: OrderedDict[_Key, VideoIndex] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _Key) -> VideoIndex | None:
        with self._lock:
            if key in self._indexes:
                self._indexes.move_to_end(key)
            return self._indexes.get(key)

    def put(self, key: _Key, index: VideoIndex) -> None:
        with self._lock:
            if key not in self._indexes:
                self._indexes[key] = index
                self._used += index.nbytes
            while self._used > self._limit:
                self._used -= self._indexes.popitem(last=False)[1].nbytes


_remembered = _Remembered(256 * 2**20)


def _probe(path: str, stream: int | None) -> VideoIndex:
    with open_video(path, stream) as (container, video):
        with media_errors(path):
            packets = list(_packets(container, video))
        index = _timed_index(path, video, packets) or _counted_index(path, video.index)
    index = _start_at_first_output(path, index)
    if index.truncated:
        _log.warning("%s: cut short: %d of %d frames exist", path, index.num_frames, index.declared_frames)
    return index


def _packets(container: InputContainer, video: VideoStream) -> Iterator[Packet]:
    """Packets that hold data, in decode order. A cut file ends where its data ends."""
    try:
        for packet in container.demux(video):
            if packet.size:
                yield packet
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        _log.warning(
            "%s: stream %d is unreadable from some point on: %s", container.name, video.index, error.strerror
        )


def _is_shown(packet: Packet, codec: str) -> bool:
    """False for a packet that decodes to no frame: pre-roll of an edit list, or a VP8 alternate reference frame."""
    if packet.is_discard:
        return False
    if codec == "vp8":  # RFC 6386, 9.1: bit 4 of the frame tag is show_frame
        return bool(bytes(packet)[0] & 0x10)
    return True


def _timed_index(path: str, video: VideoStream, packets: list[Packet]) -> VideoIndex | None:
    """The index of a file whose packets all have times of their own, else None."""
    # A damaged transport stream has packets without times: those the demuxer itself marks corrupt cannot be shown
    # and are left out. A sound packet without a time means that the format does not carry times.
    packets = [p for p in packets if not (p.pts is None and p.is_corrupt)]
    if not packets:
        raise MediaError(path, "its video stream holds no frames")
    if any(p.pts is None for p in packets):
        return None
    packet_pts = np.array([p.pts for p in packets], dtype=np.int64)
    if len(np.unique(packet_pts)) < len(packet_pts):
        return None
    codec = video.codec_context.name
    canonical = video.codec_context.codec.canonical_name
    shown = np.array([i for i, p in enumerate(packets) if _is_shown(p, canonical)], dtype=np.int64)
    if not len(shown):
        raise MediaError(path, "its video stream holds no frames")
    positions = shown[np.argsort(packet_pts[shown], kind="stable")]
    keys = {0} | {i for i, p in enumerate(packets) if p.is_keyframe}
    assert video.time_base is not None
    return VideoIndex(
        path=path,
        stream=video.index,
        codec=canonical or codec,
        width=video.codec_context.width,
        height=video.codec_context.height,
        rotation=0,
        pixel_format=str(video.codec_context.pix_fmt or ""),
        colorspace=int(video.codec_context.colorspace),
        time_base=video.time_base,
        timed=True,
        pts=packet_pts[positions],
        positions=positions,
        corrupt=np.array([packets[i].is_corrupt for i in positions], dtype=bool),
        random_access=np.array(sorted(keys), dtype=np.int64),
        packet_pts=packet_pts,
        packet_dts=np.array([p.pts if p.dts is None else p.dts for p in packets], dtype=np.int64),
        last_duration=packets[positions[-1]].duration or _frame_ticks(video),
        declared_frames=video.frames,
    )


def _counted_index(path: str, stream: int) -> VideoIndex:
    """The index of a file without usable times: found by decoding all of it, frames known by their count."""
    with open_video(path, stream) as (container, video):
        pts: list[int | None] = []
        try:
            for frame in container.decode(video):
                pts.append(frame.pts)
        except av.error.FFmpegError as error:
            _log.warning("%s: decoding stops after %d frames: %s", path, len(pts), error.strerror)
        if not pts:
            raise MediaError(path, "none of its frames can be decoded")
        assert video.time_base is not None
        ticks = _frame_ticks(video)
        times = np.array([-1 if p is None else p for p in pts], dtype=np.int64)
        if any(p is None for p in pts) or (np.diff(times) <= 0).any():
            times = np.arange(len(pts), dtype=np.int64) * ticks
        return VideoIndex(
            path=path,
            stream=stream,
            codec=video.codec_context.codec.canonical_name or video.codec_context.name,
            width=video.codec_context.width,
            height=video.codec_context.height,
            rotation=0,
            pixel_format=str(video.codec_context.pix_fmt or ""),
            colorspace=int(video.codec_context.colorspace),
            time_base=video.time_base,
            timed=False,
            pts=times,
            positions=np.arange(len(pts), dtype=np.int64),
            corrupt=np.zeros(len(pts), dtype=bool),
            random_access=np.zeros(1, dtype=np.int64),
            packet_pts=times,
            packet_dts=times,
            last_duration=ticks,
            declared_frames=0,
        )


def _frame_ticks(video: VideoStream) -> int:
    """Ticks one frame lasts by the stream's nominal rate; at least 1."""
    rate = video.average_rate or video.guessed_rate or Fraction(25)
    assert video.time_base is not None
    return max(1, round(1 / (rate * video.time_base)))


def _start_at_first_output(path: str, index: VideoIndex) -> VideoIndex:
    """Leave out frames that no decoder can show, and learn the rotation, from the first frame that comes out.

    A recording that starts in the middle of a group of pictures has packets shown before the first decodable frame.
    """
    with open_video(path, index.stream) as (container, video), media_errors(path):
        first = next(_frames_despite_errors(container, video), None)
    if first is None:
        raise MediaError(path, "none of its frames can be decoded")
    skipped = int(np.searchsorted(index.pts, first.pts)) if index.timed and first.pts is not None else 0
    if skipped:
        _log.warning("%s: its first %d frames lack what they refer to and are left out", path, skipped)
    return replace(
        index,
        rotation=first.rotation,
        pts=index.pts[skipped:],
        positions=index.positions[skipped:],
        corrupt=index.corrupt[skipped:],
    )


def _frames_despite_errors(container: InputContainer, video: VideoStream) -> Iterator[VideoFrame]:
    for packet in container.demux(video):
        try:
            yield from video.codec_context.decode(packet if packet.size else None)
        except av.error.FFmpegError:
            continue
