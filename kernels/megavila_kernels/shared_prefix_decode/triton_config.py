"""Tiles of the decoding kernels, by GPU, head dimension and rows. All are compiled by tools/kernel_report.py."""

from dataclasses import dataclass

import torch

from megavila_kernels.interval_attention.triton_config import gpu_class, padded_head_dim

# Slots that the merging kernel reads at a time.
BLOCK_SLOTS = 16


@dataclass(frozen=True)
class DecodeConfig:
    """rows: queries of a tile; keys: keys of a tile."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def decode_config(capability: tuple[int, int], d: int, dtype: torch.dtype, rows: int) -> DecodeConfig:
    """The tile for `rows` queries that read the same keys, on a GPU of this compute capability.

    Wider groups take several tiles: the keys are then read again, mostly from the cache.
    """
    columns = max(64, padded_head_dim(d))
    wanted = max(16, 1 << (rows - 1).bit_length())
    if dtype == torch.float32:
        # At full precision on the ordinary cores, for comparisons: see FULL_PRECISION of interval attention.
        return DecodeConfig(16, 32 if columns == 64 else 16, 4, 1)
    small = gpu_class(capability) == "small"
    rows = min(wanted, 64 if columns == 256 or small else 128)
    keys = {64: 128, 128: 64, 256: 32}[columns]
    warps = 8 if rows >= 64 or rows * columns >= 32 * 256 else 4
    return DecodeConfig(rows, keys, warps, 2 if small or columns == 256 else 3)
