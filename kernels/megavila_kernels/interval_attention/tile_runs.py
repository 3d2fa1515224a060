"""Which tiles the Triton kernels visit: computed once per mask, tile size and device, shared by all layers.

For each tile of queries (or of keys) the tiles on the other side that it meets are given as runs: *full* runs,
in which every row sees every key and no mask is needed, and *masked* runs. The kernel's inner loop goes over
the tiles of a run, which are neighbours in memory; hidden tiles are never touched.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavila_kernels.interval_attention.mask import IntervalMask

# Cells of the tile map classified at a time: bounds the memory of a plan over very long sequences.
MAP_CELLS = 1 << 22


@dataclass(frozen=True)
class TileRuns:
    """The visits of one kernel.

    table: int32 (programs, 4), most work first so that the last programs to start are short: tile, first full
        run, first masked run (= end of the full runs), end of the masked runs.
    runs: int32 (runs, 2), half-open ranges of tiles on the other side.
    lo, hi: int32 (n, tokens_q) of the mask, contiguous, on the kernel's device.
    visits: tile pairs visited, the measure of work.
    """

    table: Tensor
    runs: Tensor
    lo: Tensor
    hi: Tensor
    visits: int


def build_tile_runs(
    mask: IntervalMask, block_q: int, block_k: int, by_keys: bool, device: torch.device
) -> TileRuns:
    """by_keys: a program per key tile with runs of query tiles; otherwise the other way round.

    Query rows beyond the last one see nothing: as part of a run they need a mask, as the program's own tile,
    where they are not stored, they do not.
    """
    if by_keys:
        tile_map = np.concatenate(list(_tile_maps(mask, block_q, block_k, padding_sees=False)))
        parts = [_runs_of(tile_map.T)]
    else:
        parts = [_runs_of(rows) for rows in _tile_maps(mask, block_q, block_k, padding_sees=True)]
    counts = np.concatenate([count for count, _, _ in parts])  # (tiles, 2): full and masked runs
    runs = np.concatenate([runs for _, runs, _ in parts])
    work = np.concatenate([visits for _, _, visits in parts])
    end = counts.sum(axis=1).cumsum()
    begin = end - counts.sum(axis=1)
    table = np.stack([np.arange(len(work)), begin, begin + counts[:, 0], end], axis=1)
    table = table[np.argsort(-work, kind="stable")]

    def upload(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device)

    return TileRuns(
        table=upload(table),
        # Never empty: the kernel's pointer must be valid.
        runs=upload(runs if len(runs) else np.zeros((1, 2))),
        lo=mask.lo.to(device).contiguous(),
        hi=mask.hi.to(device).contiguous(),
        visits=int(work.sum()),
    )


def _tile_maps(mask: IntervalMask, block_q: int, block_k: int, padding_sees: bool) -> Iterator[np.ndarray]:
    """Rows of the uint8 (q tiles, k tiles) map, several at a time: 0 hidden, 1 masked, 2 full."""
    lo, hi = mask.bounds()
    tiles_q, tiles_k = -(-mask.tokens_q // block_q), -(-mask.tokens_k // block_k)
    padding = tiles_q * block_q - mask.tokens_q
    if padding and padding_sees:
        lo, hi = (np.pad(x, ((0, 0), (0, padding)), mode="edge") for x in (lo, hi))
    elif padding:
        lo, hi = (np.pad(x, ((0, 0), (0, padding))) for x in (lo, hi))
    shape = (len(lo), tiles_q, block_q)
    lo, hi = lo.reshape(shape), hi.reshape(shape)
    seen = hi > lo
    first = np.where(seen, lo, mask.tokens_k).min(axis=2)  # (n, q tiles)
    last = np.where(seen, hi, 0).max(axis=2)
    full_first = np.where(seen, lo, mask.tokens_k).max(axis=2)
    full_last = np.where(seen, hi, 0).min(axis=2)

    def cover(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """bool (tiles, tiles_k): the tiles [begin, end) of each row, over all n intervals."""
        rows = np.arange(begin.shape[1])
        steps = np.zeros((len(rows), tiles_k + 1), dtype=np.int16)
        for interval_begin, interval_end in zip(begin, end, strict=True):
            some = interval_begin < interval_end
            np.add.at(steps, (rows[some], interval_begin[some]), 1)
            np.add.at(steps, (rows[some], interval_end[some]), -1)
        return steps.cumsum(axis=1)[:, :tiles_k] > 0

    chunk = max(1, MAP_CELLS // max(1, tiles_k))
    for start in range(0, tiles_q, chunk):
        rows = np.s_[:, start : start + chunk]
        touched = cover(first[rows] // block_k, -(-last[rows] // block_k))
        # The last tile of keys is full only if it has block_k keys: hi never passes tokens_k.
        full = cover(-(-full_first[rows] // block_k), full_last[rows] // block_k)
        yield touched.astype(np.uint8) + (full & touched)


def _runs_of(tile_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs along the rows of a map: counts (rows, 2) of full and masked runs; runs (count, 2), row after row,
    full before masked; and the number of tiles visited by each row."""
    rows = tile_map.shape[0]
    counts = np.zeros((rows, 2), dtype=np.int64)
    found: list[np.ndarray] = []  # (k, 4): row, kind, begin, end
    for kind, value in enumerate((2, 1)):
        inside = np.pad((tile_map == value).astype(np.int8), ((0, 0), (1, 1)))
        edges = np.diff(inside, axis=1)
        row, begin = np.nonzero(edges == 1)
        end = np.nonzero(edges == -1)[1]
        counts[:, kind] = np.bincount(row, minlength=rows)
        found.append(np.stack([row, np.full_like(row, kind), begin, end], axis=1))
    runs = np.concatenate(found)
    runs = runs[np.lexsort((runs[:, 2], runs[:, 1], runs[:, 0]))][:, 2:]
    return counts, runs, (tile_map > 0).sum(axis=1)
