"""What a video decoder is: a back end that turns frame numbers of an index into RGB frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megavila.media.index import VideoIndex
from megavila.runtime.errors import MegavilaError


@dataclass(frozen=True, eq=False)
class DecodedFrames:
    """Frames in the order they were asked for.

    Attributes:
        frames: uint8 (n, 3, h, w), RGB, upright. A frame that could not be decoded is zero and not `valid`.
        pts: float64 (n,) seconds, the video's first frame at 0.
        valid: bool (n,).
        frames_decoded: frames the codec put out for this, wanted or not: the work done.
        errors: what the codec said of damaged runs, without repetition.
    """

    frames: torch.Tensor
    pts: torch.Tensor
    valid: torch.Tensor
    frames_decoded: int
    errors: tuple[str, ...] = ()


class VideoDecoder(Protocol):
    """Decodes frames of indexed videos."""

    def decode(
        self, path: str, index: VideoIndex, frame_ids: Sequence[int], size: tuple[int, int] | None
    ) -> DecodedFrames:
        """Decode `frame_ids` (any order, repeats allowed) and resample them to `size` = (height, width).

        With `size` None frames keep the video's own size. Frames that cannot be decoded are marked, not raised;
        a file that cannot be opened raises MediaError.
        """
        ...


def get_decoder(name: str = "pyav", *, workers: int = 1) -> VideoDecoder:
    """The decoder called `name`, with `workers` threads over the runs of one request. Raises MegavilaError."""
    if name == "pyav":
        from megavila.media.pyav_decoder import PyavDecoder

        return PyavDecoder(workers=workers)
    if name == "pyav_swscale":
        from megavila.media.pyav_decoder import PyavDecoder

        return PyavDecoder(workers=workers, resampler="swscale")
    raise MegavilaError(f"data.decoder={name!r} is not a video decoder; use one of 'pyav', 'pyav_swscale'")
