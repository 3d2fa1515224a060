"""Run decoding on the CPU with PyAV (FFmpeg)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import av.error
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from megavila.media.container import media_errors, open_video
from megavila.media.decoder import DecodedFrames
from megavila.media.errors import MediaError
from megavila.media.index import VideoIndex
from megavila.media.resize import resize_frame, upright
from megavila.media.runs import RETRY_DISTANCES, Run, plan_runs

# Codecs whose packets say that no other frame refers to them, and whose decoder leaves such packets out exactly.
# (AV1 loses frames that way; VP9 gains nothing.)
_SKIPPABLE = frozenset({"h264", "hevc"})


@dataclass
class _Target:
    """Where decoded frames go; each run writes rows of its own, so threads share it without a lock."""

    index: VideoIndex
    rows: dict[int, list[int]]  # frame id -> rows of the output
    frames: torch.Tensor
    valid: torch.Tensor
    convert: Callable[[VideoFrame], torch.Tensor]
    errors: list[str] = field(default_factory=list)

    def put(self, frame_id: int, frame: VideoFrame) -> None:
        image = self.convert(frame)
        if image.shape != self.frames.shape[1:]:
            was, now = tuple(self.frames.shape[2:]), tuple(image.shape[1:])
            reason = f"frame {frame_id} is {now} pixels where earlier ones are {was}; ask for a fixed size"
            raise MediaError(self.index.path, reason)
        for row in self.rows[frame_id]:
            self.frames[row] = image
            self.valid[row] = True

    def spoil_after_missing(self, run: Run) -> None:
        """Take back the frames decoded after one that never came out: they lean on it, or carry its time."""
        positions = self.index.positions
        first = min((positions[f] for f in self.missing(run)), default=None)
        for frame in run.frames if first is not None else ():
            if positions[frame] > first:
                for row in self.rows[frame]:
                    self.frames[row] = 0
                    self.valid[row] = False

    def missing(self, run: Run) -> list[int]:
        return [f for f in run.frames if not self.valid[self.rows[f][0]]]


@dataclass(frozen=True)
class PyavDecoder:
    """Decodes each run of a request from its random-access point with one thread; `workers` runs at a time.

    `resampler` "torch" is antialiased bicubic on uint8, as the models' preprocessors; "swscale" is FFmpeg's bicubic,
    for data prepared with FFmpeg.
    """

    workers: int = 1
    resampler: Literal["torch", "swscale"] = "torch"

    def decode(
        self, path: str, index: VideoIndex, frame_ids: Sequence[int], size: tuple[int, int] | None
    ) -> DecodedFrames:
        for frame_id in frame_ids:
            if not 0 <= frame_id < index.num_frames:
                raise MediaError(path, f"frame {frame_id} is outside its {index.num_frames} frames")
        height, width = size or _upright_size(index)
        rows: dict[int, list[int]] = {}
        for row, frame_id in enumerate(frame_ids):
            rows.setdefault(frame_id, []).append(row)
        target = _Target(
            index=index,
            rows=rows,
            frames=torch.zeros((len(frame_ids), 3, height, width), dtype=torch.uint8),
            valid=torch.zeros(len(frame_ids), dtype=torch.bool),
            convert=_Converter(self.resampler, size),
        )
        runs = plan_runs(index, (f for f in rows if not index.corrupt[f]))
        decoded = sum(self._map(lambda part: _decode_runs(path, target, part), _deal(runs, self.workers)))
        times = torch.from_numpy(index.pts_seconds[list(frame_ids)])
        return DecodedFrames(target.frames, times, target.valid, decoded, tuple(dict.fromkeys(target.errors)))

    def _map(self, work: Callable[[list[Run]], int], parts: list[list[Run]]) -> list[int]:
        if len(parts) <= 1:
            return [work(part) for part in parts]
        with ThreadPoolExecutor(len(parts), thread_name_prefix="decode") as pool:
            return list(pool.map(work, parts))


class _Converter:
    """Frames to RGB, upright, resampled: uint8 (3, h, w).

    Each thread keeps one reformatter: making FFmpeg's conversion context anew costs ten times the conversion of a
    small frame.
    """

    def __init__(self, resampler: str, size: tuple[int, int] | None) -> None:
        self._resampler = resampler
        self._size = size
        self._own = threading.local()

    def __call__(self, frame: VideoFrame) -> torch.Tensor:
        if not hasattr(self._own, "reformatter"):
            self._own.reformatter = VideoReformatter()
        reformat, size = self._own.reformatter.reformat, self._size
        if self._resampler == "swscale" and size is not None:
            height, width = size if frame.rotation % 180 == 0 else size[::-1]
            rgb = reformat(
                frame, width, height, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
            )
        else:
            rgb = reformat(frame, format="rgb24", threads=1)
        image = upright(rgb.to_ndarray(), frame.rotation)
        return resize_frame(torch.from_numpy(image.copy()).permute(2, 0, 1), size)


def _upright_size(index: VideoIndex) -> tuple[int, int]:
    return (index.height, index.width) if index.rotation % 180 == 0 else (index.width, index.height)


def _deal(runs: list[Run], workers: int) -> list[list[Run]]:
    """Split runs into at most `workers` contiguous parts of about equal packet counts."""
    parts: list[list[Run]] = [[] for _ in range(max(1, workers))]
    total = sum(run.stop - run.start + 1 for run in runs)
    done = 0
    for run in runs:
        parts[min(len(parts) - 1, done * len(parts) // total)].append(run)
        done += run.stop - run.start + 1
    return [part for part in parts if part]


def _decode_runs(path: str, target: _Target, runs: list[Run]) -> int:
    """Decode runs one after the other with one decoder; retry what is missed from further back."""
    decoded = 0
    timed = target.index.timed  # otherwise frames are known by counting all of them, from the start
    with open_video(path, target.index.stream) as (container, video), media_errors(path):
        for run in runs:
            decoded += _decode_run(
                container, video, target, run, skip=timed and target.index.codec in _SKIPPABLE
            )
            for back in RETRY_DISTANCES if timed else ():
                missing = target.missing(run)
                if not missing:
                    break
                for longer in plan_runs(target.index, missing, back):
                    decoded += _decode_run(container, video, target, longer, skip=False)
            target.spoil_after_missing(run)
    return decoded


def _decode_run(
    container: InputContainer, video: VideoStream, target: _Target, run: Run, *, skip: bool
) -> int:
    """Decode one run into `target` and return how many frames the codec put out.

    After the first sign of damage the rest of the run is left undecoded: later frames may lean on the damaged one,
    and FFmpeg's concealment marks few of them.
    """
    index, context = target.index, video.codec_context
    wanted = {int(index.positions[frame]): frame for frame in run.frames}
    decoded, sound_until, position = 0, run.stop + 1, run.start  # decode positions

    def take(frames: list[VideoFrame]) -> None:
        nonlocal decoded, sound_until
        for frame in frames:
            at = index.position_of_pts.get(frame.pts, -1) if index.timed else decoded  # type: ignore[arg-type]
            decoded += 1
            if frame.is_corrupt:
                target.errors.append("FFmpeg conceals damage in it")
                sound_until = min(sound_until, at)
            elif at in wanted and at < sound_until:
                target.put(wanted[at], frame)

    context.flush_buffers()
    try:
        for position, packet in _run_packets(container, video, index, run):
            if skip:
                context.skip_frame = "DEFAULT" if position in wanted else "NONREF"
            take(context.decode(packet))
            if sound_until <= run.stop or (not index.timed and decoded > run.stop):
                break
    except av.error.FFmpegError as error:
        target.errors.append(error.strerror or type(error).__name__)
        sound_until = min(sound_until, position) if index.timed else decoded
    context.skip_frame = "DEFAULT"
    try:
        take(context.decode(None))  # frames the decoder still holds back to put them in order
    except av.error.FFmpegError as error:
        target.errors.append(error.strerror or type(error).__name__)
    return decoded


def _run_packets(
    container: InputContainer, video: VideoStream, index: VideoIndex, run: Run
) -> Iterator[tuple[int, Packet]]:
    """Packets `run.start` to `run.stop` with their decode positions."""
    if not index.timed:  # one run, on a container just opened
        yield from enumerate(p for p in container.demux(video) if p.size)
        return
    # Containers differ in whether they seek by presentation or decoding time: too early only costs demultiplexing,
    # too late is found out from the first packet, and the start of the file is always right.
    start_pts, start_dts = int(index.packet_pts[run.start]), int(index.packet_dts[run.start])
    for ticks in dict.fromkeys((start_pts, start_dts, int(index.packet_dts[0]))):
        container.seek(ticks, stream=video, backward=True)
        begun = False
        for packet in container.demux(video):
            if not packet.size:
                continue
            position = -1 if packet.pts is None else index.position_of_pts.get(packet.pts, -1)
            if not begun and position > run.start:
                break
            begun = begun or position == run.start
            if begun and position >= 0:
                yield position, packet
            if position >= run.stop:
                return
        if begun:
            return
    raise MediaError(index.path, f"cannot seek to packet {run.start}; is the file changing?")
