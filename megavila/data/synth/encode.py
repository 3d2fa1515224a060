"""Pictures to H.264 MP4 files, written whole or not at all."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from megavila.data.synth.draw import MARGIN, Camera, Canvas, Colour, Image, background
from megavila.data.synth.scene import Scene, WorldError

_BITS: tuple[Colour, ...] = ((170, 120, 60), (90, 150, 150), (180, 110, 170), (110, 110, 60))


def frame_count(duration: int, fps: int) -> int:
    """Frames of a video of ``duration`` seconds; frame i is shown at ``i / fps`` seconds."""
    return duration * fps


def render(scene: Scene, rng: np.random.Generator, size: int = 84, fps: int = 4) -> Iterable[Image]:
    """Yields every frame of a scene as ``(size, size, 3)`` uint8 RGB, frame i at time ``i / fps`` seconds.

    Args:
        scene: what happens.
        rng: background, drift, noise and distractors are drawn from it; the scene fixes everything else.
        size: side of the picture in pixels, even.
        fps: frames per second.
    """
    difficulty = scene.difficulty
    frames = frame_count(scene.duration, fps)
    if scene.facts.get("dark"):
        yield from (np.zeros((size, size, 3), np.uint8) for _ in range(frames))
        return
    backdrop = background(size, rng)
    camera = Camera.make(size, frames, fps, difficulty.drift, difficulty.noise, rng)
    bits = difficulty.distractors
    origin, velocity = rng.uniform(0, 3, (bits, 2)), rng.uniform(-0.35, 0.35, (bits, 2))
    canvas = Canvas(np.empty((size + 2 * MARGIN,) * 2 + (3,), np.uint8), size)
    for index in range(frames):
        time = index / fps
        canvas.pixels[:] = backdrop
        scene.paint(scene, canvas, time)
        for bit, (x, y) in enumerate(((origin + velocity * time) % 3).tolist()):
            canvas.put("disc", _BITS[bit % len(_BITS)], x, y, 0.2)
        yield camera.shoot(canvas, index)


def encode(frames: Iterable[Image], path: Path, fps: int, crf: int = 26) -> int:
    """Encodes frames as H.264 (yuv420p, one thread, so equal input gives equal bytes) and returns how many.

    The file appears under ``path`` only when it is complete.

    Args:
        frames: ``(height, width, 3)`` uint8 RGB pictures of one even size; at least one.
        path: the MP4 file; its folder must exist.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) to 51.

    Raises:
        WorldError: there is no frame, or a side is odd.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    count = 0
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            options = {"preset": "ultrafast", "crf": str(crf), "threads": "1"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.pix_fmt = "yuv420p"
            stream.time_base = Fraction(1, fps)
            stream.gop_size = 8 * fps
            stream.thread_count = 1
            for picture in frames:
                if count == 0:
                    height, width = picture.shape[:2]
                    if height % 2 or width % 2:
                        raise WorldError(f"pictures are {width}x{height}; yuv420p needs even sides")
                    stream.height, stream.width = height, width
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = count, Fraction(1, fps)
                container.mux(stream.encode(frame))
                count += 1
            if count == 0:
                raise WorldError(f"no frame to encode for {path}")
            container.mux(stream.encode(None))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count
