"""VILA's projectors: from the patches of a frame to rows of the language model's embedding space."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from megavila.config import ProjectorConfig, VisionConfig
from megavila.runtime.errors import MegavilaError

# Side of the square of neighbouring patches that becomes one token, by VILA's mm_projector_type.
# `mlp_downsample` is what VILA has run under that name since NVILA (December 2024), the same function as
# `mlp_downsample_2x2_fix`; before, its tokens came column by column (VILA-1.5, the first LongVILA).
DOWNSAMPLE = {
    "linear": 1,
    "mlp2x_gelu": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}


class SpaceToChannel(nn.Module):
    """Joins each `side` x `side` square of patches into one row; the grid is padded with zeros to divide.

    Channels of a row are those of its patches from top left to bottom right; rows are ordered from top left
    too.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, grid², c) -> (n, ceil(grid / side)², side² · c)."""
        n, count, channels = patches.shape
        grid, side = math.isqrt(count), self.side
        if grid * grid != count:
            raise MegavilaError(
                f"{count} patches do not form a square grid; the projector needs square frames"
            )
        padding = -grid % side
        squares = (grid + padding) // side
        cells = F.pad(patches.view(n, grid, grid, channels), (0, 0, 0, padding, 0, padding))
        cells = cells.view(n, squares, side, squares, side, channels).transpose(2, 3)
        return cells.reshape(n, squares * squares, side * side * channels)


class Projector(nn.Module):
    """The modules are numbered in `layers` as VILA numbers them, so checkpoint names carry over.

    Args:
        kind: VILA's mm_projector_type, a key of DOWNSAMPLE.
        vision_hidden: width of the tower.
        hidden: width of the language model.
    """

    def __init__(self, kind: str, vision_hidden: int, hidden: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        if kind not in DOWNSAMPLE:
            raise MegavilaError(f"unknown projector kind {kind!r}; use one of {sorted(DOWNSAMPLE)}")
        side, c = DOWNSAMPLE[kind], vision_hidden
        layers: list[nn.Module]
        if kind == "linear":
            layers = [nn.Linear(c, hidden)]
        elif kind == "mlp2x_gelu":
            layers = [nn.Linear(c, hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        elif side == 2:
            layers = [SpaceToChannel(2), nn.LayerNorm(4 * c), nn.Linear(4 * c, hidden), nn.GELU()]
            layers += [nn.Linear(hidden, hidden)]
        else:
            layers = [SpaceToChannel(3), nn.LayerNorm(9 * c), nn.Linear(9 * c, 3 * c), nn.GELU()]
            layers += [nn.LayerNorm(3 * c), nn.Linear(3 * c, hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        self.layers = nn.Sequential(*layers).to(dtype)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(n, patches, vision_hidden) -> (n, tokens_per_frame, hidden)."""
        return self.layers(patches)


def tokens_per_frame(vision: VisionConfig, projector: ProjectorConfig) -> int:
    """Rows the projector makes of one frame: ceil(patches per side / downsampling)²."""
    return math.ceil(vision.patches_per_side / DOWNSAMPLE[projector.kind]) ** 2


def num_media_rows(num_frames: int, tokens: int, temporal_pooling: int = 1) -> int:
    """Rows a video of `num_frames` frames fills in a prompt: ceil(num_frames / temporal_pooling) · tokens.

    tokens: rows of one frame, as `tokens_per_frame` says.
    """
    return math.ceil(num_frames / temporal_pooling) * tokens


def pool_frames(rows: torch.Tensor, temporal_pooling: int) -> torch.Tensor:
    """Mean over each run of `temporal_pooling` = k consecutive frames of one video.

    As VILA's TSP encoder with pool size [k, 1, 1].
    (n, tokens, hidden) -> (ceil(n / k), tokens, hidden). The last run may be shorter: the mean is over the
    frames it has. A video cut into slices pools to the same rows if each slice but the last is a multiple of
    k frames.
    """
    if temporal_pooling == 1:
        return rows
    n = rows.shape[0]
    whole = n - n % temporal_pooling
    pooled = rows[:whole].unflatten(0, (-1, temporal_pooling)).mean(dim=1) if whole else rows[:0]
    return pooled if whole == n else torch.cat([pooled, rows[whole:].mean(dim=0, keepdim=True)])
