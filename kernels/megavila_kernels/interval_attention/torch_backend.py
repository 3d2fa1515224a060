"""Interval attention in plain torch: the CPU path, and the fallback where no Triton kernel runs.

Partial results are fp32 (fp64 for fp64 inputs) and are joined once, so splitting a row over several blocks
costs no precision. The backward pass recomputes probabilities from the row's global LSE, as FlashAttention-2
does (Dao 2023, algorithm 2), with delta_i = dout_i . out_i - dlse_i, which also carries a gradient that
arrives at the LSE.

Scores are kept in units of log 2: exp2 takes the same time for any argument, while the CPU's exp slows down
    up to a hundredfold on the very negative arguments that a mask produces.
"""

import math

import torch
from torch import Tensor

from megavila_kernels.interval_attention.backend import (
    AttentionState,
    Gradients,
    RowGradients,
    accumulation_dtype,
    finish,
)
from megavila_kernels.interval_attention.flash_cpu import flash_backward, flash_forward
from megavila_kernels.interval_attention.mask import IntervalMask
from megavila_kernels.interval_attention.plan import Bags, Chunk, Plan

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class TorchBackend:
    """See `Backend`."""

    def accumulate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float, state: AttentionState | None
    ) -> AttentionState:
        out, lse = attend_forward(q, k, v, _plan(q, k, mask), scale)
        # The part's own softmax as a state: its sum, counted from its lse, is 1, or 0 where nothing is seen.
        top, total = lse * LOG2E, torch.isfinite(lse).to(lse.dtype)
        if state is None:
            return AttentionState(out, top, total)
        highest = torch.maximum(state.top, top)
        pivot = highest.masked_fill(highest == float("-inf"), 0.0)
        old, new = torch.exp2(state.top - pivot), torch.exp2(top - pivot)
        state.acc.mul_(old[..., None]).addcmul_(out, new[..., None])
        return AttentionState(state.acc, highest, state.total * old + total * new)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            out, lse = attend_forward(q, k, v, _plan(q, k, mask), scale)
            return out.to(q.dtype), lse
        return finish(self.accumulate(q, k, v, mask, scale, state), q.dtype)

    def row_gradients(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> RowGradients:
        return RowGradients(dout, out, lse, dlse, prepared=None)

    def backward(
        self,
        rows: RowGradients,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        into: Gradients | None = None,
    ) -> Gradients:
        plan = _plan(q, k, mask)
        dq, dk, dv = attend_backward(rows.dout, rows.dlse, q, k, v, rows.out, rows.lse, plan, scale)
        if into is None:
            return Gradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))
        for total, part in zip((into.dq, into.dk, into.dv), (dq, dk, dv), strict=True):
            total.add_(part)
        return into


def _plan(q: Tensor, k: Tensor, mask: IntervalMask) -> Plan:
    return mask.plan(q.shape[1], k.shape[1], q.device)


def attend_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """out (tokens_q, heads, d) and lse (tokens_q, heads), both in the accumulation dtype."""
    tokens, heads, d = q.shape
    dtype = accumulation_dtype(q)
    q_rows, k_rows, v_rows = q.reshape(-1, d), k.reshape(-1, d), v.reshape(-1, d)
    parts = torch.empty(plan.q_parts, d, dtype=dtype, device=q.device)
    # One entry more than parts: what the padding of the bags' table points to.
    top = torch.full((plan.q_parts + 1,), float("-inf"), dtype=dtype, device=q.device)
    total = torch.zeros(plan.q_parts + 1, dtype=dtype, device=q.device)
    scratch = _Scratch(plan, d, dtype, q.device, backward=False)
    for chunk in plan.chunks:
        shape = _Shape(chunk, plan)
        queries = shape.q(q_rows, scratch.queries)
        keys, values = shape.k(k_rows, scratch.keys), shape.k(v_rows, scratch.values)
        scores = shape.scores(scratch.scores, queries, keys, scale)
        row_top = shape.q_slice(top)
        torch.amax(scores, dim=-1, out=row_top)
        scores.sub_(row_top[..., None]).exp2_()
        torch.sum(scores, dim=-1, out=shape.q_slice(total))
        torch.bmm(scores, values, out=shape.q_slice(parts))
    for block in plan.large:
        rows = slice(block.q_start, block.q_start + (block.q1 - block.q0) * heads)
        block_out, block_lse = flash_forward(q, k, v, block, scale, dtype)
        parts[rows] = block_out.reshape(-1, d)
        top[rows] = block_lse.reshape(-1) * LOG2E
        total[rows] = 1.0
    return _join(parts, top, total, plan.q_bags, tokens, heads)


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the accumulation dtype, given the rows' final out and lse.

    With the out and lse of a softmax over more keys than k holds, these are the exact partial gradients of
    this part.
    """
    d = q.shape[-1]
    dtype = accumulation_dtype(q)
    q_rows, k_rows, v_rows, dout_rows = (x.reshape(-1, d) for x in (q, k, v, dout))
    delta = (dout.to(dtype) * out).sum(dim=-1)
    if dlse is not None:
        delta = delta - dlse
    delta = delta.reshape(-1)
    # Rows that see nothing meet only hidden pairs (as padding of a chunk): any finite lse will do.
    pivot = lse.masked_fill(lse == float("-inf"), 0.0).reshape(-1) * LOG2E
    dq_parts = torch.empty(plan.q_parts, d, dtype=dtype, device=q.device)
    dk_parts = torch.empty(plan.k_parts, d, dtype=dtype, device=q.device)
    dv_parts = torch.empty(plan.k_parts, d, dtype=dtype, device=q.device)
    scratch = _Scratch(plan, d, dtype, q.device, backward=True)
    for chunk in plan.chunks:
        shape = _Shape(chunk, plan)
        queries, grads = shape.q(q_rows, scratch.queries), shape.q(dout_rows, scratch.grads)
        keys, values = shape.k(k_rows, scratch.keys), shape.k(v_rows, scratch.values)
        p = shape.scores(scratch.scores, queries, keys, scale)
        p.sub_(shape.q(pivot, scratch.row)).exp2_()
        torch.bmm(p.mT, grads, out=shape.k_slice(dv_parts))
        ds = shape.matrix(scratch.score_grads)
        torch.bmm(grads, values.mT, out=ds)
        ds.sub_(shape.q(delta, scratch.row)).mul_(p)
        shape.q_slice(dq_parts).baddbmm_(ds, keys, beta=0, alpha=scale)
        shape.k_slice(dk_parts).baddbmm_(ds.mT, queries, beta=0, alpha=scale)
    for block in plan.large:
        dq_block, dk_block, dv_block = flash_backward(dout, dlse, q, k, v, out, lse, block, scale, dtype)
        dq_parts[block.q_start : block.q_start + dq_block.shape[0] * plan.heads] = dq_block.reshape(-1, d)
        rows = slice(block.k_start, block.k_start + dk_block.shape[0] * plan.kv_heads)
        dk_parts[rows] = dk_block.reshape(-1, d)
        dv_parts[rows] = dv_block.reshape(-1, d)
    return (
        _sum_bags(dq_parts, plan.q_bags).view(q.shape),
        _sum_bags(dk_parts, plan.k_bags).view(k.shape),
        _sum_bags(dv_parts, plan.k_bags).view(v.shape),
    )


class _Scratch:
    """Working memory shared by all chunks of a call: fresh allocations would cost more than what fills
    them."""

    def __init__(self, plan: Plan, d: int, dtype: torch.dtype, device: torch.device, backward: bool) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.queries = empty(plan.max_q_rows, d)
        self.keys, self.values = empty(plan.max_k_rows, d), empty(plan.max_k_rows, d)
        self.scores = empty(plan.max_scores)
        self.grads = empty(plan.max_q_rows if backward else 0, d)
        self.score_grads = empty(plan.max_scores if backward else 0)
        self.row = empty(plan.max_q_rows if backward else 0)


def _gather(rows: Tensor, index: Tensor, buffer: Tensor) -> Tensor:
    target = buffer[: len(index)]
    if rows.dtype == buffer.dtype:
        return torch.index_select(rows, 0, index, out=target)
    return target.copy_(rows.index_select(0, index))


class _Shape:
    """Brings rows into a chunk's batch layout (batch * kv_heads, repeat * rows or keys, ...)."""

    def __init__(self, chunk: Chunk, plan: Plan) -> None:
        self.chunk = chunk
        self.heads = plan.heads
        self.matrices = chunk.batch * plan.kv_heads
        self.q_rows = plan.heads // plan.kv_heads * chunk.rows

    def q(self, rows: Tensor, buffer: Tensor) -> Tensor:
        return _gather(rows, self.chunk.q_index, buffer).view(self.matrices, self.q_rows, -1)

    def k(self, rows: Tensor, buffer: Tensor) -> Tensor:
        return _gather(rows, self.chunk.k_index, buffer).view(self.matrices, self.chunk.keys, -1)

    def q_slice(self, parts: Tensor) -> Tensor:
        count = self.matrices * self.q_rows
        return parts[self.chunk.q_start : self.chunk.q_start + count].view(
            self.matrices, self.q_rows, *parts.shape[1:]
        )

    def k_slice(self, parts: Tensor) -> Tensor:
        count = self.matrices * self.chunk.keys
        return parts[self.chunk.k_start : self.chunk.k_start + count].view(self.matrices, self.chunk.keys, -1)

    def matrix(self, scratch: Tensor) -> Tensor:
        count = self.matrices * self.q_rows * self.chunk.keys
        return scratch[:count].view(self.matrices, self.q_rows, self.chunk.keys)

    def scores(self, scratch: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Masked scores in units of log 2."""
        scores = self.matrix(scratch).baddbmm_(queries, keys.mT, beta=0, alpha=scale * LOG2E)
        if self.chunk.hidden is not None:
            scores.view(self.chunk.batch, self.heads, self.chunk.rows, self.chunk.keys).add_(
                self.chunk.hidden
            )
        return scores


def _join(
    parts: Tensor, top: Tensor, total: Tensor, bags: Bags, tokens: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Join unnormalised partial outputs whose rows have maximum `top` (log 2 units) and sum `total`."""
    assert bags.table is not None and bags.table_slot is not None
    tops, totals = top[bags.table], total[bags.table]  # (rows, widest bag)
    row_top = tops.amax(dim=1, keepdim=True)
    row_top = row_top.masked_fill(row_top == float("-inf"), 0.0)
    share = torch.exp2(tops - row_top)
    row_total = (share * totals).sum(dim=1, keepdim=True)
    lse = ((row_top + row_total.log2()) * LN2).view(tokens, heads)
    weight = (share / row_total).view(-1)[bags.table_slot]
    return _sum_bags(parts, bags, weight).view(tokens, heads, -1), lse


def _sum_bags(parts: Tensor, bags: Bags, weight: Tensor | None = None) -> Tensor:
    # The op behind F.embedding_bag, without the bookkeeping that only its own backward pass needs.
    return torch.ops.aten._embedding_bag_forward_only(
        parts, bags.index, bags.offset, False, 0, False, weight
    )[0]
