"""Rows travel from the ranks that hold them straight to the ranks that want them, and gradients back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavila.runtime.errors import MegavilaError

RowRanges = Sequence[Sequence[tuple[int, int]]]
"""For each rank the ranges [start, stop) of global row indices that it holds, in the order of its local rows."""


def exchange_rows(
    rows: Tensor,
    owner_ranges: RowRanges,
    wanted: Sequence[Tensor],
    group: dist.ProcessGroup,
    *,
    gradient_from: Sequence[bool] | None = None,
) -> Tensor:
    """The global rows `wanted[rank]` of this rank, (n_wanted, D), in that order; differentiable in `rows`.

    A collective: all ranks of the group call it with the same ranges and lists, so no indices travel. No rank
    ever holds more than its own rows, those that it wants and what it sends. A row travels once to a rank,
    however often it is wanted there.

    Args:
        rows: (n_local, D), this rank's rows. Ranks agree on whether it requires grad, one without rows too.
        owner_ranges: who holds which rows; disjoint.
        wanted: one int64 tensor of global row indices a rank, on the host; rows may repeat.
        group: in whose order ranks are counted.
        gradient_from: the ranks whose gradients are added up, by default all. Tensor-parallel ranks that hold
            the same rows also hold the same gradient of them: one of them speaks for all.

    The backward pass, a collective too, adds gradients up per row in fp32 (fp64 for fp64 rows).

    Raises MegavilaError where ranges overlap, a wanted row is held by nobody, or counts do not fit.
    """
    size, rank = group.size(), group.rank()
    if len(owner_ranges) != size or len(wanted) != size:
        raise MegavilaError(
            f"{len(owner_ranges)} lists of row ranges and {len(wanted)} lists of wanted rows for a group of "
            f"{size} ranks; give one of each per rank"
        )
    held = sum(stop - start for start, stop in owner_ranges[rank])
    if rows.dim() != 2 or rows.shape[0] != held:
        raise MegavilaError(
            f"rank {rank} holds {held} rows by its ranges but passes {tuple(rows.shape)}; expected ({held}, D)"
        )
    holdings = _Holdings(owner_ranges)
    speaks = [True] * size if gradient_from is None else list(gradient_from)
    plan = _plan(holdings, wanted, rank, rows.device, speaks)
    return _Exchange.apply(rows, plan, group)  # type: ignore[no-any-return]


class _Holdings:
    """Finds the rank and local place of global rows."""

    def __init__(self, owner_ranges: RowRanges) -> None:
        self.size = len(owner_ranges)
        pieces = []
        for rank, ranges in enumerate(owner_ranges):
            place = 0
            for start, stop in ranges:
                if start < stop:
                    pieces.append((start, stop, rank, place))
                place += stop - start
        pieces.sort()
        for before, after in zip(pieces, pieces[1:], strict=False):
            if before[1] > after[0]:
                raise MegavilaError(
                    f"rows {before[0]}-{before[1] - 1} of rank {before[2]} and {after[0]}-{after[1] - 1} of rank "
                    f"{after[2]} overlap; a row is held by one rank"
                )
        table = torch.tensor(pieces, dtype=torch.int64).view(-1, 4)
        self.start, self.stop, self.rank, self.place = table.unbind(1)

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(owner, place among its local rows) of global row indices."""
        piece = torch.searchsorted(self.start.contiguous(), indices, right=True) - 1
        if len(self.start) == 0:
            lost = torch.ones_like(indices, dtype=torch.bool)
        else:
            lost = (piece < 0) | (indices >= self.stop[piece.clamp(min=0)])
        if bool(lost.any()):
            raise MegavilaError(
                f"row {int(indices[lost][0])} is wanted but no rank holds it; the ranks hold "
                f"{int((self.stop - self.start).sum())} rows"
            )
        return self.rank[piece], self.place[piece] + indices - self.start[piece]


@dataclass(frozen=True)
class _Plan:
    """What this rank sends and receives; `send[r]` and `receive[r]` are None where nothing passes."""

    num_rows: int  # distinct rows wanted here, ordered by owner and place
    order: Tensor | None  # wanted row i is distinct row order[i]; None: in that order already
    repeats: bool  # a row is wanted here more than once
    send: list[Tensor | None]  # local rows
    receive: list[slice | None]  # distinct rows
    sent_once: list[
        bool
    ]  # rank r wants none of the rows it has from here twice, so its gradients are not sums
    received_once: list[bool]
    speaks: list[bool]


def _plan(
    holdings: _Holdings, wanted: Sequence[Tensor], rank: int, device: torch.device, speaks: list[bool]
) -> _Plan:
    send: list[Tensor | None] = []
    sent_once = []
    for other, indices in enumerate(wanted):
        owner, place = holdings.locate(indices)
        mine = place[owner == rank]
        distinct = mine.unique()
        send.append(distinct.to(device) if len(distinct) else None)
        sent_once.append(len(distinct) == len(mine))
        if other == rank:
            # The sender's rows are in the order of their places, so this order is by owner first.
            bound = int(place.max()) + 1 if len(place) else 1
            keys, order = (owner * bound + place).unique(return_inverse=True)
            counts = torch.bincount(keys // bound, minlength=holdings.size).tolist()
            asked = torch.bincount(owner, minlength=holdings.size).tolist()
    stops = [sum(counts[: r + 1]) for r in range(holdings.size)]
    sorted_already = torch.equal(order, torch.arange(len(order)))
    return _Plan(
        num_rows=len(keys),
        order=None if sorted_already else order.to(device),
        repeats=len(keys) < len(order),
        send=send,
        receive=[slice(stop - n, stop) if n else None for stop, n in zip(stops, counts, strict=True)],
        sent_once=sent_once,
        received_once=[a == n for a, n in zip(asked, counts, strict=True)],
        speaks=speaks,
    )


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: _Plan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.num_local, ctx.dtype = plan, group, rows.shape[0], rows.dtype
        received = rows.new_empty(plan.num_rows, rows.shape[1])
        outgoing = [None if index is None else rows.index_select(0, index) for index in plan.send]
        incoming = [None if part is None else received[part] for part in plan.receive]
        _swap(outgoing, incoming, group)
        return received if plan.order is None else received.index_select(0, plan.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan, group = ctx.plan, ctx.group
        wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        speaks, (gradient,) = plan.speaks[group.rank()], grads
        outgoing: list[Tensor | None] = [None] * group.size()
        if speaks:
            collected = _collect(gradient, plan, wide)
            outgoing = [
                # Sums travel as they are; a gradient that is no sum is exact in the rows' own type.
                None if part is None else collected[part].to(ctx.dtype if once else wide)
                for part, once in zip(plan.receive, plan.received_once, strict=True)
            ]
        incoming = [
            None
            if index is None or not spoken
            else gradient.new_empty(len(index), gradient.shape[1], dtype=ctx.dtype if once else wide)
            for index, once, spoken in zip(plan.send, plan.sent_once, plan.speaks, strict=True)
        ]
        _swap(outgoing, incoming, group)
        total = gradient.new_zeros(ctx.num_local, gradient.shape[1], dtype=wide)
        for index, part in zip(
            plan.send, incoming, strict=True
        ):  # in the order of ranks: always the same sum
            if index is not None and part is not None:
                total.index_add_(0, index, part.to(wide))
        return total.to(ctx.dtype), None, None


def _collect(gradient: Tensor, plan: _Plan, wide: torch.dtype) -> Tensor:
    """Gradients of the distinct rows from those of the wanted ones."""
    if plan.order is None:
        return gradient
    if not plan.repeats:
        return torch.empty_like(gradient).index_copy_(0, plan.order, gradient)
    sums = gradient.new_zeros(plan.num_rows, gradient.shape[1], dtype=wide)
    return sums.index_add_(0, plan.order, gradient.to(wide))


def _swap(outgoing: list[Tensor | None], incoming: list[Tensor | None], group: dist.ProcessGroup) -> None:
    """Sends `outgoing[r]` to rank r and fills `incoming[r]` from it, for all ranks at once.

    Point to point, because gloo has no all-to-all of unequal parts for every type.
    """
    rank = group.rank()
    operations = []
    for other, (ours, theirs) in enumerate(zip(outgoing, incoming, strict=True)):
        if other == rank:
            if ours is not None and theirs is not None:
                theirs.copy_(ours)
            continue
        if ours is not None:
            operations.append(dist.P2POp(dist.isend, ours.contiguous(), group=group, group_peer=other))
        if theirs is not None:
            operations.append(dist.P2POp(dist.irecv, theirs, group=group, group_peer=other))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
