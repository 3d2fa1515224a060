"""Which keys each query row sees, as half-open intervals, and the blocks that such a mask decomposes into."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from megavila_kernels.interval_attention.plan import Plan
    from megavila_kernels.interval_attention.tile_runs import TileRuns

BlockShape = Literal["full", "causal", "general"]

# A merged block may waste this share of its area, or this much outright, to save the overhead of a further
# block.
MERGE_RATIO = 1.25
MERGE_AREA = 1024
# Ragged masks fall apart into one-row runs; up to this many rows are kept together at a higher waste.
RAGGED_ROWS = 32
RAGGED_RATIO = 8
# No block grows past this area by merging.
MERGED_AREA_LIMIT = 1 << 17


@dataclass(frozen=True)
class Block:
    """Query rows [q0, q1) against keys [k0, k1).

    `full`: every row sees every key. `causal`: aligned bottom right, the last row sees all, each row before
    it one key less. `general`: rows see what interval number `interval` of the mask says, all of it within
    [k0, k1).
    """

    q0: int
    q1: int
    k0: int
    k1: int
    shape: BlockShape
    interval: int

    @property
    def rows(self) -> int:
        return self.q1 - self.q0

    @property
    def keys(self) -> int:
        return self.k1 - self.k0

    @property
    def area(self) -> int:
        """Number of (row, key) pairs in the rectangle, seen or not."""
        return self.rows * self.keys


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Each query row sees the union of n disjoint half-open key intervals; empty ones (hi <= lo) are allowed.

    lo, hi: int32 (n, tokens_q). tokens_k: number of keys. Construction checks that the intervals lie within
        the keys and that those of one row are disjoint (a key counted twice would be a silent error), which
        on CUDA tensors waits for the device once. Plans are computed once per head count and device and
        shared by every layer that uses the mask.
    """

    lo: Tensor
    hi: Tensor
    tokens_k: int
    _plans: dict[tuple[int, int, torch.device], "Plan"] = field(default_factory=dict, init=False, repr=False)
    _tile_runs: dict[tuple[int, int, bool, torch.device], "TileRuns"] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.lo.dim() != 2 or self.lo.shape != self.hi.shape:
            raise ValueError(
                f"lo and hi must both be (intervals, tokens_q); got {tuple(self.lo.shape)} and {tuple(self.hi.shape)}"
            )
        if self.lo.dtype != torch.int32 or self.hi.dtype != torch.int32:
            raise ValueError(f"lo and hi must be int32; got {self.lo.dtype} and {self.hi.dtype}")
        lo, hi = self.bounds()
        seen = hi > lo
        if bool((seen & ((lo < 0) | (hi > self.tokens_k))).any()):
            row = int(np.nonzero((seen & ((lo < 0) | (hi > self.tokens_k))).any(axis=0))[0][0])
            raise ValueError(
                f"row {row} has an interval outside the {self.tokens_k} keys: lo {lo[:, row].tolist()}, hi {hi[:, row].tolist()}"
            )
        if lo.shape[0] > 1:
            # Empty intervals are moved to the end so that they cannot seem to overlap.
            starts = np.where(seen, lo, self.tokens_k)
            ends = np.where(seen, hi, self.tokens_k)
            order = np.argsort(starts, axis=0, kind="stable")
            starts, ends = np.take_along_axis(starts, order, 0), np.take_along_axis(ends, order, 0)
            overlap = (ends[:-1] > starts[1:]).any(axis=0)
            if overlap.any():
                row = int(np.nonzero(overlap)[0][0])
                raise ValueError(
                    f"the intervals of row {row} overlap: lo {lo[:, row].tolist()}, hi {hi[:, row].tolist()}"
                )

    @property
    def tokens_q(self) -> int:
        return self.lo.shape[1]

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are seen: the work of attention."""
        return int((self.hi - self.lo).clamp_min(0).sum(dtype=torch.int64))

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """lo and hi as int64 numpy arrays (n, tokens_q), empty intervals as hi == lo."""
        lo = self.lo.cpu().numpy().astype(np.int64)
        hi = np.maximum(self.hi.cpu().numpy().astype(np.int64), lo)
        return lo, hi

    def visible(self) -> Tensor:
        """Dense bool (tokens_q, tokens_k); for tests and tiny inputs."""
        keys = torch.arange(self.tokens_k, device=self.lo.device)
        inside = (keys >= self.lo[..., None]) & (keys < self.hi[..., None])
        return inside.any(dim=0)

    def plan(self, heads: int, kv_heads: int, device: torch.device) -> "Plan":
        """The torch backend's execution plan, computed at the first call for these head counts and this
        device."""
        from megavila_kernels.interval_attention.plan import build_plan

        key = (heads, kv_heads, device)
        if key not in self._plans:
            self._plans[key] = build_plan(self, heads, kv_heads, device)
        return self._plans[key]

    def tile_runs(self, block_q: int, block_k: int, by_keys: bool, device: torch.device) -> "TileRuns":
        """The Triton kernels' visits, computed at the first call for these tiles and this device."""
        from megavila_kernels.interval_attention.tile_runs import build_tile_runs

        key = (block_q, block_k, by_keys, device)
        if key not in self._tile_runs:
            self._tile_runs[key] = build_tile_runs(self, block_q, block_k, by_keys, device)
        return self._tile_runs[key]


def find_blocks(mask: IntervalMask, keep_area: int) -> list[Block]:
    """Rectangles that cover every visible (row, key) pair exactly once.

    Runs of at least `keep_area` pairs stay as they are (`full` or `causal`); smaller neighbours are merged
    where the rectangle around them wastes little.
    """
    lo, hi = mask.bounds()
    blocks: list[Block] = []
    for interval in range(lo.shape[0]):
        blocks += _merge(
            list(_runs(lo[interval], hi[interval], interval)), lo[interval], hi[interval], keep_area
        )
    return blocks


def _runs(lo: np.ndarray, hi: np.ndarray, interval: int) -> Iterator[Block]:
    """Maximal stretches of rows in which lo is constant and hi is constant (full) or grows by one a row
    (causal)."""
    rows = len(lo)
    seen = hi > lo
    joined = (lo[1:] == lo[:-1]) & seen[1:] & seen[:-1]
    growth = hi[1:] - hi[:-1]
    step = np.where(joined & (growth == 0), 0, np.where(joined & (growth == 1), 1, 2))
    # stretch_end[i]: the first step after i of another kind.
    changes = np.append(np.nonzero(np.diff(step))[0] + 1, len(step))
    stretch_end = (
        changes[np.searchsorted(changes, np.arange(len(step)), side="right")] if len(step) else changes
    )
    nonempty = np.nonzero(seen)[0]
    row = 0
    while row < rows:
        if not seen[row]:
            following = np.searchsorted(nonempty, row)
            if following == len(nonempty):
                return
            row = int(nonempty[following])
        kind = int(step[row]) if row < len(step) else 2
        last = row if kind == 2 else int(stretch_end[row])
        shape: BlockShape = "causal" if kind == 1 else "full"
        yield Block(row, last + 1, int(lo[row]), int(hi[last]), shape, interval)
        row = last + 1


def _merge(runs: list[Block], lo: np.ndarray, hi: np.ndarray, keep_area: int) -> list[Block]:
    merged: list[Block] = []
    useful = 0  # area of the runs inside merged[-1]
    for run in runs:
        previous = merged[-1] if merged else None
        if previous is not None and previous.q1 == run.q0 and max(previous.area, run.area) < keep_area:
            k0, k1 = min(previous.k0, run.k0), max(previous.k1, run.k1)
            area = (run.q1 - previous.q0) * (k1 - k0)
            pays = area <= MERGE_RATIO * (useful + run.area) + MERGE_AREA or (
                run.q1 - previous.q0 <= RAGGED_ROWS and area <= RAGGED_RATIO * (useful + run.area)
            )
            if pays and area <= MERGED_AREA_LIMIT:
                merged[-1] = Block(previous.q0, run.q1, k0, k1, "general", run.interval)
                useful += run.area
                continue
        merged.append(run)
        useful = run.area
    return merged
