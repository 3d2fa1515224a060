"""Projectors against VILA's definition written out with loops, and the counting of media rows."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megavila.config import ProjectorConfig, VisionConfig
from megavila.models.projector import DOWNSAMPLE, Projector, num_media_rows, pool_frames, tokens_per_frame
from megavila.runtime.errors import MegavilaError

C, HIDDEN = 6, 10


def _joined(frame: torch.Tensor, side: int) -> torch.Tensor:
    """(grid², c) -> one row per square of patches; patch by patch, with zeros beyond the border."""
    grid = math.isqrt(frame.shape[0])
    rows = []
    for top in range(0, grid, side):
        for left in range(0, grid, side):
            row = []
            for y in range(top, top + side):
                for x in range(left, left + side):
                    inside = y < grid and x < grid
                    row.append(frame[y * grid + x] if inside else torch.zeros(frame.shape[1]))
            rows.append(torch.cat(row))
    return torch.stack(rows)


def _expected(projector: Projector, kind: str, frame: torch.Tensor) -> torch.Tensor:
    p = {name: parameter.detach() for name, parameter in projector.named_parameters()}

    def linear(x: torch.Tensor, index: int) -> torch.Tensor:
        return x @ p[f"layers.{index}.weight"].T + p[f"layers.{index}.bias"]

    def norm(x: torch.Tensor, index: int) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"layers.{index}.weight"] + p[f"layers.{index}.bias"]

    if kind == "linear":
        return linear(frame, 0)
    if kind == "mlp2x_gelu":
        return linear(F.gelu(linear(frame, 0)), 2)
    if kind == "mlp_downsample_3x3_fix":
        x = F.gelu(linear(norm(_joined(frame, 3), 1), 2))
        return linear(F.gelu(linear(norm(x, 4), 5)), 7)
    return linear(F.gelu(linear(norm(_joined(frame, 2), 1), 2)), 4)


@pytest.mark.parametrize("kind", sorted(DOWNSAMPLE))
@pytest.mark.parametrize("grid", [4, 5, 6, 7])
def test_equals_vila_patch_by_patch(kind: str, grid: int) -> None:
    torch.manual_seed(0)
    projector = Projector(kind, C, HIDDEN, dtype=torch.float32)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    frames = torch.randn(3, grid * grid, C)
    expected = torch.stack([_expected(projector, kind, frame) for frame in frames])
    torch.testing.assert_close(projector(frames), expected, rtol=1e-4, atol=1e-4)
    vision = VisionConfig(
        hidden_size=C, num_layers=1, num_heads=1, intermediate_size=4, image_size=grid * 5 + 3, patch_size=5
    )
    config: Any = {"kind": kind}
    assert tokens_per_frame(vision, ProjectorConfig(**config)) == expected.shape[1]


def test_rows_of_published_models() -> None:
    def tokens(image_size: int, kind: str) -> int:
        vision = VisionConfig(
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=16,
            image_size=image_size,
            patch_size=14,
        )
        return tokens_per_frame(vision, ProjectorConfig(kind=kind))  # type: ignore[arg-type]

    assert tokens(384, "mlp_downsample") == 196  # LongVILA: 27 -> 28 patches a side
    assert tokens(448, "mlp_downsample_2x2_fix") == 256  # LongVILA-R1
    assert tokens(448, "mlp_downsample_3x3_fix") == 121  # NVILA-Lite


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 16, 17])
def test_temporal_pooling(frames: int) -> None:
    rows = torch.randn(frames, 3, 5)
    pooled = pool_frames(rows, 8)
    expected = [rows[start : start + 8].mean(0) for start in range(0, frames, 8)]
    torch.testing.assert_close(pooled, torch.stack(expected))
    assert pooled.shape[0] * 3 == num_media_rows(frames, 3, 8)
    assert torch.equal(pool_frames(rows, 1), rows)
    sliced = torch.cat([pool_frames(part, 8) for part in rows.split(8)])
    assert torch.equal(sliced, pooled)


def test_errors() -> None:
    with pytest.raises(MegavilaError, match="unknown projector kind 'mlp9'"):
        Projector("mlp9", C, HIDDEN, dtype=torch.float32)
    with pytest.raises(MegavilaError, match="square grid"):
        Projector("mlp_downsample", C, HIDDEN, dtype=torch.float32)(torch.randn(1, 12, C))
