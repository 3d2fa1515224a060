"""From chosen frames to pixels: any contiguous slice of a sampled video, and a memory of recent slices."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

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
    """Decoded slices kept in memory up to `limit_bytes`, the least recently used leaving first.

    Keyed by content, so two paths to the same video share one entry. Slices handed out are shared: not to be written.
    """

    limit_bytes: int
    decoder: VideoDecoder = field(default_factory=get_decoder)
    hits: int = 0
    misses: int = 0
    used_bytes: int = 0
    _slices: OrderedDict[tuple[object, ...], torch.Tensor] = field(default_factory=OrderedDict, repr=False)

    def load(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """As `load_frames`."""
        key = (video.fingerprint, video.frame_ids[start:stop], size)
        if key in self._slices:
            self.hits += 1
            self._slices.move_to_end(key)
            return self._slices[key]
        self.misses += 1
        frames = load_frames(video, size, start, stop, self.decoder)
        if frames.nbytes <= self.limit_bytes:
            self._slices[key] = frames
            self.used_bytes += frames.nbytes
            while self.used_bytes > self.limit_bytes:
                self.used_bytes -= self._slices.popitem(last=False)[1].nbytes
        return frames
