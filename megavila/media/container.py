"""Opening a container and choosing its video stream, with FFmpeg's failures turned into `MediaError`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import av
import av.error
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from megavila.media.errors import MediaError


@contextmanager
def media_errors(path: str) -> Iterator[None]:
    """Re-raise FFmpeg's and the file system's errors inside the block as `MediaError(path, reason)`."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise MediaError(path, f"FFmpeg cannot read it: {error.strerror}") from error
    except (OSError, UnicodeError) as error:
        raise MediaError(path, str(error)) from error


@contextmanager
def open_video(path: str, stream: int | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open `path` and yield its container and one video stream, ready to be decoded by one thread.

    `stream` is an index among all streams of the file; by default FFmpeg's best video stream (cover art excluded).
    Raises MediaError when the file is missing, empty, not media, or holds no such video stream.
    """
    if not os.path.exists(path):
        raise MediaError(path, "no such file")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise MediaError(path, "the file is empty (0 bytes)")
    with media_errors(path):
        # Broken metadata text must not stop the decoding of pictures.
        container = av.open(path, metadata_errors="replace")
    with container:
        chosen = _choose_stream(path, container, stream)
        for other in container.streams:
            if other.index != chosen.index:
                other.discard = Discard.all
        # Parallelism is over runs: one thread a decoder also gives frames without a pipeline's delay.
        chosen.codec_context.thread_count = 1
        if chosen.codec_context.codec.canonical_name != "h264":
            # Stop at damage that can be told, instead of concealing it with pixels of other frames. The H.264
            # decoder would also stop at the leading frames of an open group of pictures, which are not damaged.
            chosen.codec_context.options = {"err_detect": "explode"}
        yield container, chosen


def _choose_stream(path: str, container: InputContainer, stream: int | None) -> VideoStream:
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
        raise MediaError(path, f"it has no video stream (streams: {kinds})")
    if stream is not None:
        chosen = next((s for s in videos if s.index == stream), None)
        if chosen is None:
            raise MediaError(
                path, f"stream {stream} is not one of its video streams {[s.index for s in videos]}"
            )
    else:
        best = container.streams.best("video")
        chosen = next((s for s in videos if best is not None and s.index == best.index), videos[0])
    if chosen.codec_context is None:
        raise MediaError(path, f"FFmpeg has no decoder for its video stream {chosen.index}")
    return chosen
