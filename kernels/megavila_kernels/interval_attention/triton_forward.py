"""Forward kernel of interval attention (FlashAttention-2: Dao, 2023, algorithm 1, over runs of tiles).

A program owns one tile of queries of one head and keeps acc, top and total in registers:

    s = q kᵀ · scale · log2 e;  top' = max(top, max_j s);  p = 2^(s - top')
    total' = total · 2^(top - top') + Σ_j p;  acc' = acc · 2^(top - top') + p v

With `LOAD_STATE` it goes on from an earlier call (a ring step); with `FINISH` it writes out = acc / total and
lse = ln 2 · (top + log2 total) instead of the state.
"""

# Triton's loop constructs are not in its type stubs.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    base,
    start,
    limit,
    stride,
    ROWS: tl.constexpr,
    ROW_MASK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows [start, start + ROWS) of a (tokens, d) matrix at `base`, as (ROWS, BLOCK_D); zeros from row `limit`
    and from column D on. Offsets are in 64 bits: tokens x heads x d may pass 2^31."""
    row, column = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if ROW_MASK and BLOCK_D > D:
        return tl.load(pointers, mask=(row < limit)[:, None] & (column < D)[None, :], other=0.0)
    if ROW_MASK:
        return tl.load(pointers, mask=(row < limit)[:, None], other=0.0)
    if BLOCK_D > D:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(
    base, start, limit, stride, values, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The counterpart of `load_rows`, in the destination's dtype."""
    row, column = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < limit)[:, None]
    if BLOCK_D > D:
        inside = inside & (column < D)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def visible_pairs(lo, hi, queries, keys, tokens_q, INTERVALS: tl.constexpr, BY_KEYS: tl.constexpr):
    """bool (queries, keys), or its transpose: which pairs are seen. Rows beyond tokens_q see nothing."""
    row = queries < tokens_q
    lo_row = tl.load(lo + queries, mask=row, other=0)
    hi_row = tl.load(hi + queries, mask=row, other=0)
    if BY_KEYS:
        seen = (keys[:, None] >= lo_row[None, :]) & (keys[:, None] < hi_row[None, :])
    else:
        seen = (keys[None, :] >= lo_row[:, None]) & (keys[None, :] < hi_row[:, None])
    for interval in tl.static_range(1, INTERVALS):
        lo_row = tl.load(lo + interval * tokens_q + queries, mask=row, other=0)
        hi_row = tl.load(hi + interval * tokens_q + queries, mask=row, other=0)
        if BY_KEYS:
            seen = seen | ((keys[:, None] >= lo_row[None, :]) & (keys[:, None] < hi_row[None, :]))
        else:
            seen = seen | ((keys[None, :] >= lo_row[:, None]) & (keys[None, :] < hi_row[:, None]))
    return seen


@triton.jit
def _attend_run(
    acc,
    top,
    total,
    queries,
    first,
    last,
    k,
    v,
    lo,
    hi,
    rows,
    stride_k,
    stride_v,
    tokens_q,
    tokens_k,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERVALS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc, top and total after the key tiles [first, last)."""
    for tile in range(first, last):
        key_rows = load_rows(k, tile * BLOCK_K, tokens_k, stride_k, BLOCK_K, MASKED, D, BLOCK_D)
        scores = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION)
        if MASKED:
            keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            seen = visible_pairs(lo, hi, rows, keys, tokens_q, INTERVALS, False)
            scores = tl.where(seen, scores * scale_log2, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen nothing yet subtracts 0, for -inf - -inf is nan.
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(scores - pivot[:, None])
        else:
            # scale > 0 lets the scaling follow the maximum: one multiply-add a score.
            new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            pivot = new_top
            p = tl.exp2(scores * scale_log2 - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        value_rows = load_rows(v, tile * BLOCK_K, tokens_k, stride_v, BLOCK_K, MASKED, D, BLOCK_D)
        acc = tl.dot(p.to(value_rows.dtype), value_rows, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["tokens_q", "tokens_k"])
def forward_kernel(
    q,
    k,
    v,
    lo,
    hi,
    table,
    runs,
    acc_state,
    top_state,
    total_state,
    out,
    lse,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    tokens_q,
    tokens_k,
    scale_log2,
    HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERVALS: tl.constexpr,
    LOAD_STATE: tl.constexpr,
    FINISH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads vary fastest: programs that run at the same time read the same keys.
    program = tl.program_id(0)
    head = program % HEADS
    entry = table + (program // HEADS) * 4
    start = tl.load(entry) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)

    queries = load_rows(q + head * stride_qh, start, tokens_q, stride_qt, BLOCK_Q, True, D, BLOCK_D)
    keys_base = k + (head // REPEAT) * stride_kh
    values_base = v + (head // REPEAT) * stride_vh
    row_index = rows.to(tl.int64) * HEADS + head
    real = rows < tokens_q
    if LOAD_STATE:
        top = tl.load(top_state + row_index, mask=real, other=float("-inf"))
        total = tl.load(total_state + row_index, mask=real, other=0.0)
        acc = load_rows(acc_state + head * D, start, tokens_q, HEADS * D, BLOCK_Q, True, D, BLOCK_D)
    else:
        top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    # Full runs first, then masked ones.
    for masked in tl.static_range(2):
        for run in range(tl.load(entry + 1 + masked), tl.load(entry + 2 + masked)):
            acc, top, total = _attend_run(
                acc,
                top,
                total,
                queries,
                tl.load(runs + run * 2),
                tl.load(runs + run * 2 + 1),
                keys_base,
                values_base,
                lo,
                hi,
                rows,
                stride_kt,
                stride_vt,
                tokens_q,
                tokens_k,
                scale_log2,
                D,
                BLOCK_D,
                BLOCK_K,
                INTERVALS,
                masked,
                PRECISION,
            )

    if FINISH:
        empty = total == 0.0
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        store_rows(out + head * D, start, tokens_q, HEADS * D, acc, BLOCK_Q, D, BLOCK_D)
        # The logarithm's argument is 1 for empty rows, whose lse is -inf because top is.
        natural = (top + tl.log2(tl.where(empty, 1.0, total))) * LN2
        tl.store(lse + row_index, natural, mask=real)
    else:
        store_rows(acc_state + head * D, start, tokens_q, HEADS * D, acc, BLOCK_Q, D, BLOCK_D)
        tl.store(top_state + row_index, top, mask=real)
        tl.store(total_state + row_index, total, mask=real)
