"""Who holds which tokens of a layout under context parallelism.

Every prompt is cut into 2N chunks and rank r holds chunks r and 2N - 1 - r (zigzag): a token sees all before
it, so a late chunk and an early one together are the same work on every rank. The responses of a group, one
after another, are cut into N even parts. Any number of tokens, groups and ranks will do; what does not divide
makes a part one token longer.

Groups that balance over the ranks as they are need not be split: each rank then takes whole groups and attention sends
nothing. So it is for short layouts too, where sending costs more than what a rank that waits could have computed.

A rank keeps its tokens in the layout's order, and padding behind them. Among tokens in that order each interval
of the layout's mask is an interval again, so `mask` says in the attention kernel's own terms what any set of
query tokens sees of any block of keys, whatever the layout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from megavila_kernels import IntervalMask
from torch import Tensor

from megavila.mrsp.layout import Layout
from megavila.runtime.errors import MegavilaError

PADDING = -1

# Where groups stay whole, no rank has more than this many times the mean, in tokens and in attention.
SLACK = 1.1
# Below this many tokens a rank even NVLink does not hide the exchange behind the computation (28 query, 4 key/value heads).
SHORT = 330


@dataclass(frozen=True, eq=False)
class Sharding:
    """The shards of all context ranks of one replica; every rank computes the same object but for `rank`.

    Attributes:
        layout: what is split.
        ranks: context-parallel degree N.
        rank: this rank among them.
        rows: rows of every rank's shard, padding included.
        split: whether tokens of one group lie on several ranks.
        tokens: for each rank the tokens of the layout that it holds, int64, increasing, on the host.
    """

    layout: Layout
    ranks: int
    rank: int
    rows: int
    split: bool
    tokens: tuple[Tensor, ...]
    _rank_of: Tensor = field(repr=False)  # (t,) the rank that holds each token
    _row_of: Tensor = field(repr=False)  # (t,) and its row there

    def padded_tokens(self, rank: int | None = None) -> Tensor:
        """(rows,) tokens of a rank's shard (by default of this rank's), PADDING behind them."""
        own = self.tokens[self.rank if rank is None else rank]
        return torch.nn.functional.pad(own, (0, self.rows - len(own)), value=PADDING)

    def targets_of(self, rank: int) -> tuple[Tensor, Tensor]:
        """The targets that a rank predicts, as numbers into `layout.targets`, and the rows of its shard that
        do so; both int64 (n,).

        A target belongs to the rank of the row that predicts it, so none is lost where a response and the
        prompt before it, or two halves of a response, lie on different ranks.
        """
        predictors = self.layout.predictor_rows.cpu()
        targets = (self._rank_of[predictors] == rank).nonzero().squeeze(1)
        return targets, self._row_of[predictors[targets]]

    def media_rows_of(self, rank: int) -> Tensor:
        """Rows of the layout's media, int64 and increasing, that stand in a rank's shard; each named once."""
        index = self.layout.media_index.cpu()[self.tokens[rank]]
        return index[index >= 0].unique(sorted=True)

    def mask(self, queries: Tensor, keys: Tensor) -> IntervalMask | None:
        """What the tokens `queries` see of the block `keys`, or None where they see nothing of it.

        queries: (q,) tokens of the layout in any order. keys: (k,) tokens, increasing. The mask's rows and keys
        are counted within the two.
        """
        lo, hi = self._bounds
        block = keys.numpy()
        inside_lo = np.searchsorted(block, lo[:, queries.numpy()])
        inside_hi = np.searchsorted(block, hi[:, queries.numpy()])
        used = (inside_hi > inside_lo).any(axis=1)
        if not used.any():
            return None
        return IntervalMask(
            torch.from_numpy(inside_lo[used].astype(np.int32)),
            torch.from_numpy(inside_hi[used].astype(np.int32)),
            len(block),
        )

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.layout.mask.bounds()

    def __str__(self) -> str:
        lines = [
            f"{self.layout.num_tokens} tokens in {self.ranks} shards of {self.rows} rows",
            f"{'rank':>4}  {'tokens':>7}  {'padding':>7}  {'targets':>7}  {'media':>7}  {'pairs':>12}  holds",
        ]
        lo, hi = self._bounds
        for rank, tokens in enumerate(self.tokens):
            pairs = int((hi - lo)[:, tokens.numpy()].sum())
            runs = ", ".join(f"{first}-{last}" for first, last in _runs(tokens)) or "none"
            lines.append(
                f"{rank:>4}  {len(tokens):>7}  {self.rows - len(tokens):>7}  {len(self.targets_of(rank)[0]):>7}  "
                f"{len(self.media_rows_of(rank)):>7}  {pairs:>12}  {runs}"
            )
        return "\n".join(lines)


def shard_layout(
    layout: Layout, ranks: int = 1, rank: int = 0, *, tensor: int = 1, split_always: bool = True
) -> Sharding:
    """Split a layout over `ranks` context ranks.

    Args:
        split_always: split every group, also where whole groups would keep all ranks busy or the layout is short.
        tensor: tensor-parallel degree; every shard has at least one row and a multiple of this many, so that
            sequence parallelism can split it.

    Raises MegavilaError for a rank that is not among them.
    """
    if not 0 <= rank < ranks:
        raise MegavilaError(f"context rank {rank} is not among {ranks} ranks; use 0 to {ranks - 1}")
    whole = None if split_always or ranks == 1 else _whole_groups(layout, ranks)
    rank_of = _split_groups(layout, ranks) if whole is None else whole
    tokens = tuple((rank_of == holder).nonzero().squeeze(1) for holder in range(ranks))
    row_of = torch.empty_like(rank_of)
    for held in tokens:
        row_of[held] = torch.arange(len(held))
    longest = max(1, *(len(held) for held in tokens))
    rows = -(-longest // tensor) * tensor
    return Sharding(layout, ranks, rank, rows, whole is None and ranks > 1, tokens, rank_of, row_of)


def _split_groups(layout: Layout, ranks: int) -> Tensor:
    """(t,) the rank that holds each token where every group is split."""
    rank_of = torch.empty(layout.num_tokens, dtype=torch.int64)
    for run in _causal_runs(layout):
        chunk = _even_parts(len(run), 2 * ranks)
        rank_of[run] = torch.minimum(chunk, 2 * ranks - 1 - chunk)
    for run in _response_runs(layout):
        rank_of[run] = _even_parts(len(run), ranks)
    return rank_of


def _whole_groups(layout: Layout, ranks: int) -> Tensor | None:
    """(t,) the rank that holds each token where none is split, or None where some rank would wait too long.

    The longest group goes first, each to the rank with the fewest tokens so far.
    """
    group_of = torch.empty(layout.num_tokens, dtype=torch.int64)
    for segment in layout.segments:
        group_of[segment.start : segment.stop] = segment.group
    lo, hi = layout.mask.bounds()
    pairs = torch.from_numpy((hi - lo).sum(axis=0)).double()
    # (groups, 2): tokens, and what attention computes for them
    work = torch.zeros(layout.num_groups, 2, dtype=torch.float64)
    work.index_add_(0, group_of, torch.stack((torch.ones_like(pairs), pairs), dim=1))
    load = torch.zeros(ranks, 2, dtype=torch.float64)
    holder = torch.empty(layout.num_groups, dtype=torch.int64)
    for group in work[:, 0].argsort(descending=True, stable=True).tolist():
        holder[group] = load[:, 0].argmin()
        load[holder[group]] += work[group]
    balanced = bool((load.amax(0) <= SLACK * load.mean(0)).all())
    return holder[group_of] if balanced or layout.num_tokens < SHORT * ranks else None


def _causal_runs(layout: Layout) -> Iterator[Tensor]:
    """The tokens of each prompt."""
    for segment in layout.segments:
        if segment.response is None:
            yield torch.arange(segment.start, segment.stop)


def _response_runs(layout: Layout) -> Iterator[Tensor]:
    """The tokens of all responses of each group, one after another."""
    parts: list[list[Tensor]] = [[] for _ in range(layout.num_groups)]
    for segment in layout.segments:
        if segment.response is not None:
            parts[segment.group].append(torch.arange(segment.start, segment.stop))
    yield from (torch.cat(group) for group in parts if group)


def _even_parts(length: int, parts: int) -> Tensor:
    """(length,) the part of each element, in order; lengths of parts differ by one at most."""
    return torch.arange(length) * parts // max(length, 1)


def _runs(tokens: Tensor) -> Sequence[tuple[int, int]]:
    """First and last of each stretch of consecutive numbers."""
    if not len(tokens):
        return []
    breaks = (tokens.diff() != 1).nonzero().squeeze(1)
    firsts = torch.cat([tokens[:1], tokens[breaks + 1]])
    lasts = torch.cat([tokens[breaks], tokens[-1:]])
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))
