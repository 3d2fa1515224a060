"""Frames to the model's size: rotation and bicubic resampling, one frame at a time.

One frame at a time, so that a frame's pixels do not depend on which others were asked for with it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def upright(image: np.ndarray, rotation: int) -> np.ndarray:
    """Turn `image` (h, w, 3) counterclockwise by `rotation` degrees, a multiple of 90."""
    return np.rot90(image, rotation // 90) if rotation % 360 else image


def resize_frame(frame: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Resample `frame`, uint8 (3, h, w), to `size` = (height, width) with antialiased bicubic filtering on uint8.

    The filter is Pillow's bicubic (support widened when shrinking), which the models' own preprocessors use, with
    weights of 16 bits in place of Pillow's 32: under 1 % of the values differ, by 1 and very rarely 2 grey levels.
    """
    if size is None or tuple(frame.shape[-2:]) == size:
        return frame
    return F.interpolate(frame[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
