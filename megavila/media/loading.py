"""From chosen frames to pixels: any contiguous slice of a sampled video, and a memory of recent frames."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megavila.media.decoder import VideoDecoder, get_decoder
from megavila.media.errors import MediaError
from megavila.media.index import probe
from megavila.media.sampling import SampledVideo


def load_frames(
    video: SampledVideo,
    size: tuple[int, int] | None,
    start: int = 0,
    stop: int | None = None,
    decoder: VideoDecoder | None = None,
) -> torch.Tensor:
    """Sampled frames `start` to `stop` (exclusive, None for the end) as uint8 (stop - start, 3, height, width).

    `size` is (height, width), or None for the video's own. Only the runs that these frames need are decoded, and
    slices laid end to end are the whole, bit for bit. Raises MediaError when any of the frames cannot be decoded:
    a caller that can do with fewer asks the decoder, whose answer marks each frame.
    """
    stop = video.num_frames if stop is None else stop
    if not 0 <= start <= stop <= video.num_frames:
        raise ValueError(f"slice [{start}, {stop}) is outside the {video.num_frames} frames of {video.path}")
    decoder = decoder or get_decoder()
    index = probe(video.path, video.stream)
    frame_ids = video.frame_ids[start:stop]
    result = decoder.decode(video.path, index, frame_ids, size)
    if not bool(result.valid.all()):
        lost = [frame for frame, valid in zip(frame_ids, result.valid.tolist(), strict=True) if not valid]
        names = ", ".join(str(frame) for frame in lost[:5]) + (", …" if len(lost) > 5 else "")
        why = f" ({'; '.join(result.errors)})" if result.errors else ""
        raise MediaError(
            video.path, f"{len(lost)} of {len(frame_ids)} frames cannot be decoded: {names}{why}"
        )
    return result.frames


@dataclass
class FrameCache:
    """Decoded frames kept in memory up to `limit_bytes`, the least recently used leaving first.

    Kept frame by frame and keyed by content: other samplings of a video decode only the frames they do not share, and
    two paths to the same video share all. Frames handed out are copies.
    """

    limit_bytes: int
    decoder: VideoDecoder = field(default_factory=get_decoder)
    hits: int = 0
    misses: int = 0
    used_bytes: int = 0
    _frames: OrderedDict[tuple[Any, ...], torch.Tensor] = field(default_factory=OrderedDict, repr=False)

    def load(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """As `load_frames`."""
        wanted = video.frame_ids[start:stop]
        keys = [(video.fingerprint, video.stream, size, frame) for frame in wanted]
        missing = [(frame, key) for frame, key in zip(wanted, keys, strict=True) if key not in self._frames]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if len(missing) == len(keys):
            frames = load_frames(video, size, start, stop, self.decoder)
            self._keep(dict(zip(keys, frames, strict=True)))
            return frames
        found = {key: self._frames[key] for key in keys if key in self._frames}
        if missing:
            rest = replace(video, frame_ids=tuple(frame for frame, _ in missing), timestamps=())
            found |= zip(
                [key for _, key in missing], load_frames(rest, size, decoder=self.decoder), strict=True
            )
        self._keep(found)
        return torch.stack([found[key] for key in keys])

    def warm(
        self, videos: Sequence[SampledVideo], size: tuple[int, int] | None, workers: int
    ) -> Iterator[SampledVideo]:
        """Decode videos that are not here yet, in `workers` threads; yields each of `videos` once it is kept."""
        with ThreadPoolExecutor(workers) as pool:
            decoded = pool.map(lambda video: load_frames(video, size, decoder=self.decoder), videos)
            for video, frames in zip(videos, decoded, strict=True):
                self.misses += len(frames)
                keys = [(video.fingerprint, video.stream, size, frame) for frame in video.frame_ids]
                self._keep(dict(zip(keys, frames, strict=True)))
                yield video

    def _keep(self, frames: Mapping[tuple[Any, ...], torch.Tensor]) -> None:
        """Remember `frames` as the most recently used."""
        for key, frame in frames.items():
            known = self._frames.pop(key, None)
            if known is None:
                # A frame of a decoded batch would keep the whole batch in memory.
                known = frame.clone()
                self.used_bytes += known.nbytes
            self._frames[key] = known
        while self.used_bytes > self.limit_bytes:
            self.used_bytes -= self._frames.popitem(last=False)[1].nbytes
