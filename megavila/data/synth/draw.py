"""Sprites and camera of the synthetic world: numpy only, a few slice assignments per frame.

Positions are in *cells*: the picture is a 3 by 3 board, so ``x = 0.5, 1.5, 2.5`` are the centres of the left,
middle and right columns and ``y`` counts downwards. A cell is one third of the picture's side; at 42 px with
14 px patches every cell is one patch of the vision tower.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Image = NDArray[np.uint8]

RED: Colour = (225, 40, 40)
GREEN: Colour = (30, 175, 60)
BLUE: Colour = (45, 80, 235)
YELLOW: Colour = (250, 215, 40)
ORANGE: Colour = (250, 130, 20)
WHITE: Colour = (250, 250, 250)
BLACK: Colour = (20, 20, 20)
BROWN: Colour = (120, 75, 40)
GREY: Colour = (120, 120, 125)
SKIN: Colour = (240, 200, 165)
PURPLE: Colour = (150, 70, 190)
NAMED: dict[str, Colour] = {"red": RED, "green": GREEN, "blue": BLUE}

MARGIN = 8


@functools.lru_cache(maxsize=512)
def mask(shape: str, width: int, height: int) -> NDArray[np.bool_]:
    """Boolean stencil ``(height, width)`` of a shape: disc, rect, cup, star, gem, up, left or right."""
    y, x = np.mgrid[0:height, 0:width]
    u = (x + 0.5) / width * 2 - 1
    v = (y + 0.5) / height * 2 - 1
    match shape:
        case "disc":
            return u * u + v * v <= 1
        case "rect":
            return np.ones((height, width), dtype=bool)
        case "cup":
            return np.abs(u) <= 0.72 + 0.28 * (v + 1) / 2
        case "gem":
            return np.abs(u) + np.abs(v) <= 1
        case "star":
            angle, radius = np.arctan2(u, -v), np.hypot(u, v)
            return radius <= 0.62 + 0.38 * np.cos(5 * angle)
        case "up":
            return np.abs(u) <= (v + 1) / 2
        case "left":
            return np.abs(v) <= (u + 1) / 2
        case "right":
            return np.abs(v) <= (1 - u) / 2
    raise ValueError(f"unknown shape {shape!r}")


@dataclass
class Canvas:
    """A picture being painted, with a margin that lets the camera drift.

    Attributes:
        pixels: ``(size + 2 * MARGIN, size + 2 * MARGIN, 3)`` uint8 RGB.
        size: side of the visible picture in pixels.
    """

    pixels: Image
    size: int

    def put(
        self, shape: str, colour: Colour, x: float, y: float, width: float, height: float | None = None
    ) -> None:
        """Paint a shape centred at (x, y); all lengths in cells. Parts outside the canvas are cut off."""
        cell = self.size / 3
        w = max(1, round(width * cell))
        h = max(1, round((width if height is None else height) * cell))
        stencil = mask(shape, w, h)
        left, top = round(x * cell - w / 2) + MARGIN, round(y * cell - h / 2) + MARGIN
        rows, columns = self.pixels.shape[:2]
        y0, y1, x0, x1 = max(top, 0), min(top + h, rows), max(left, 0), min(left + w, columns)
        if y0 >= y1 or x0 >= x1:
            return
        self.pixels[y0:y1, x0:x1][stencil[y0 - top : y1 - top, x0 - left : x1 - left]] = colour

    def person(self, colour: Colour, x: float, y: float, scale: float = 1.0) -> None:
        """A figure in a coloured coat, head on top, about one cell wide and ``1.6 * scale`` cells high."""
        self.put("cup", colour, x, y + 0.3 * scale, 0.85 * scale, 1.0 * scale)
        self.put("disc", SKIN, x, y - 0.45 * scale, 0.5 * scale)


def background(size: int, rng: np.random.Generator) -> Image:
    """A pale, slightly tinted gradient with soft stripes, ``(size + 2 * MARGIN,) * 2 + (3,)`` uint8."""
    side = size + 2 * MARGIN
    tint = rng.uniform(150, 200, 3)
    ramp = np.linspace(-15, 15, side)[:, None] * rng.uniform(-1, 1)
    stripes = 6 * np.sin(np.arange(side)[None, :] * rng.uniform(0.1, 0.4) + rng.uniform(0, 6))
    return np.clip(tint + (ramp + stripes)[:, :, None], 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Camera:
    """Slow drift and sensor noise.

    Attributes:
        size: side of the picture in pixels.
        path: ``(frames, 2)`` whole-pixel offsets (y, x), each within ``[-MARGIN, MARGIN]``.
        grain: ``(3, size + 16, size + 16, 3)`` int16 noise fields that are rolled from frame to frame.
        shifts: ``(frames, 3)`` which field and which offset each frame uses.
    """

    size: int
    path: NDArray[np.int64]
    grain: NDArray[np.int16]
    shifts: NDArray[np.int64]

    @classmethod
    def make(
        cls, size: int, frames: int, fps: float, drift: float, noise: float, rng: np.random.Generator
    ) -> "Camera":
        """Builds a camera; ``drift`` is in pixels (at most MARGIN), ``noise`` a standard deviation."""
        times = np.arange(frames)[:, None] / fps
        period, phase = rng.uniform(6, 20, 2), rng.uniform(0, 2 * np.pi, 2)
        amplitude = min(drift, MARGIN)
        path = np.rint(amplitude * np.sin(2 * np.pi * times / period + phase)).astype(np.int64)
        grain = np.rint(noise * rng.standard_normal((3, size + 16, size + 16, 3), dtype=np.float32)).astype(
            np.int16
        )
        shifts = rng.integers(0, [3, 17, 17], (frames, 3))
        return cls(size, path, grain, shifts)

    def shoot(self, canvas: Canvas, frame: int) -> Image:
        """The picture of one frame, ``(size, size, 3)`` uint8 RGB."""
        dy, dx = (MARGIN + self.path[frame]).tolist()
        view = canvas.pixels[dy : dy + self.size, dx : dx + self.size].astype(np.int16)
        field, oy, ox = self.shifts[frame].tolist()
        view += self.grain[field, oy : oy + self.size, ox : ox + self.size]
        return np.clip(view, 0, 255, out=view).astype(np.uint8)
