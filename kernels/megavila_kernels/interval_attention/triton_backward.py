"""Backward kernels of interval attention (FlashAttention-2: Dao, 2023, algorithm 2), deterministic.

One kernel owns tiles of queries and computes dq, another owns tiles of keys and computes dk and dv, summing
over the query heads that share a K/V head; no atomics. With lse the logarithm of the whole softmax's
denominator and delta = dout . out - dlse,

    p = 2^(s - lse · log2 e);  ds = p ∘ (dout vᵀ - delta)
    dv = pᵀ dout;  dk = scale · dsᵀ q;  dq = scale · ds k
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from megavila_kernels.interval_attention.triton_forward import load_rows, store_rows, visible_pairs

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens_q"])
def prepare_kernel(
    dout,
    out,
    lse,
    dlse,
    prepared,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    tokens_q,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """prepared (2, heads, tokens_q): lse in units of log 2, and delta. The tokens of a head are neighbours in
    it, as a tile of the kernels below reads them."""
    head = tl.program_id(0) % HEADS
    start = (tl.program_id(0) // HEADS) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    real = rows < tokens_q
    row_index = rows.to(tl.int64) * HEADS + head
    natural = tl.load(lse + row_index, mask=real, other=0.0)
    # Empty rows get a finite pivot: all their pairs are hidden, but -inf - -inf would be nan.
    pivot = tl.where(natural == float("-inf"), 0.0, natural * LOG2E)
    grad_rows = load_rows(dout + head * stride_gh, start, tokens_q, stride_gt, BLOCK_Q, True, D, BLOCK_D)
    out_rows = load_rows(out + head * stride_oh, start, tokens_q, stride_ot, BLOCK_Q, True, D, BLOCK_D)
    delta = tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse + row_index, mask=real, other=0.0)
    target = prepared + head.to(tl.int64) * tokens_q + rows
    tl.store(target, pivot, mask=real)
    tl.store(target + HEADS * tokens_q.to(tl.int64), delta, mask=real)


@triton.jit
def _dq_run(
    acc,
    queries,
    grads,
    pivot,
    delta_row,
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
    for tile in range(first, last):
        start = tile * BLOCK_K
        key_rows = load_rows(k, start, tokens_k, stride_k, BLOCK_K, MASKED, D, BLOCK_D)
        value_rows = load_rows(v, start, tokens_k, stride_v, BLOCK_K, MASKED, D, BLOCK_D)
        scores = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - pivot[:, None])
        if MASKED:
            keys = start + tl.arange(0, BLOCK_K)
            p = tl.where(visible_pairs(lo, hi, rows, keys, tokens_q, INTERVALS, False), p, 0.0)
        dp = tl.dot(grads, tl.trans(value_rows), input_precision=PRECISION)
        ds = p * (dp - delta_row[:, None])
        acc = tl.dot(ds.to(key_rows.dtype), key_rows, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["tokens_q", "tokens_k"])
def dq_kernel(
    q,
    k,
    v,
    dout,
    prepared,
    lo,
    hi,
    table,
    runs,
    dq,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    tokens_q,
    tokens_k,
    scale,
    HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERVALS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % HEADS
    entry = table + (program // HEADS) * 4
    start = tl.load(entry) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    real = rows < tokens_q

    queries = load_rows(q + head * stride_qh, start, tokens_q, stride_qt, BLOCK_Q, True, D, BLOCK_D)
    grads = load_rows(dout + head * stride_gh, start, tokens_q, stride_gt, BLOCK_Q, True, D, BLOCK_D)
    pivots = prepared + head.to(tl.int64) * tokens_q
    pivot = tl.load(pivots + rows, mask=real, other=0.0)
    delta_row = tl.load(pivots + HEADS * tokens_q.to(tl.int64) + rows, mask=real, other=0.0)
    keys_base = k + (head // REPEAT) * stride_kh
    values_base = v + (head // REPEAT) * stride_vh
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    # Full runs first, then masked ones.
    for masked in tl.static_range(2):
        for run in range(tl.load(entry + 1 + masked), tl.load(entry + 2 + masked)):
            acc = _dq_run(
                acc,
                queries,
                grads,
                pivot,
                delta_row,
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
                scale * LOG2E,
                D,
                BLOCK_D,
                BLOCK_K,
                INTERVALS,
                masked,
                PRECISION,
            )
    acc *= scale
    if ACCUMULATE:
        acc += load_rows(dq + head * D, start, tokens_q, HEADS * D, BLOCK_Q, True, D, BLOCK_D)
    store_rows(dq + head * D, start, tokens_q, HEADS * D, acc, BLOCK_Q, D, BLOCK_D)


@triton.jit
def _dkdv_run(
    dk_acc,
    dv_acc,
    key_rows,
    value_rows,
    keys,
    first,
    last,
    q,
    dout,
    pivots,
    deltas,
    lo,
    hi,
    stride_q,
    stride_g,
    tokens_q,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    INTERVALS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores are held transposed, (keys, queries), so that no product needs its score operand turned."""
    for tile in range(first, last):
        start = tile * BLOCK_Q
        rows = start + tl.arange(0, BLOCK_Q)
        queries = load_rows(q, start, tokens_q, stride_q, BLOCK_Q, MASKED, D, BLOCK_D)
        scores = tl.dot(key_rows, tl.trans(queries), input_precision=PRECISION)
        if MASKED:
            pivot = tl.load(pivots + rows, mask=rows < tokens_q, other=0.0)
            seen = visible_pairs(lo, hi, rows, keys, tokens_q, INTERVALS, True)
            p = tl.where(seen, tl.exp2(scores * scale_log2 - pivot[None, :]), 0.0)
        else:
            pivot = tl.load(pivots + rows)
            p = tl.exp2(scores * scale_log2 - pivot[None, :])
        grads = load_rows(dout, start, tokens_q, stride_g, BLOCK_Q, MASKED, D, BLOCK_D)
        dv_acc = tl.dot(p.to(grads.dtype), grads, dv_acc, input_precision=PRECISION)
        dp = tl.dot(value_rows, tl.trans(grads), input_precision=PRECISION)
        if MASKED:
            delta = tl.load(deltas + rows, mask=rows < tokens_q, other=0.0)
        else:
            delta = tl.load(deltas + rows)
        ds = p * (dp - delta[None, :])
        dk_acc = tl.dot(ds.to(queries.dtype), queries, dk_acc, input_precision=PRECISION)
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=["tokens_q", "tokens_k"])
def dkdv_kernel(
    q,
    k,
    v,
    dout,
    prepared,
    lo,
    hi,
    table,
    runs,
    dk,
    dv,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    tokens_q,
    tokens_k,
    scale,
    HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERVALS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    KV_HEADS: tl.constexpr = HEADS // REPEAT
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    entry = table + (program // KV_HEADS) * 4
    start = tl.load(entry) * BLOCK_K
    keys = start + tl.arange(0, BLOCK_K)

    key_rows = load_rows(k + kv_head * stride_kh, start, tokens_k, stride_kt, BLOCK_K, True, D, BLOCK_D)
    value_rows = load_rows(v + kv_head * stride_vh, start, tokens_k, stride_vt, BLOCK_K, True, D, BLOCK_D)
    row_stride = KV_HEADS * D
    if ACCUMULATE:
        # Loaded now rather than added at the end, where they would need registers beside the sums.
        dk_acc = load_rows(dk + kv_head * D, start, tokens_k, row_stride, BLOCK_K, True, D, BLOCK_D) / scale
        dv_acc = load_rows(dv + kv_head * D, start, tokens_k, row_stride, BLOCK_K, True, D, BLOCK_D)
    else:
        dk_acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        dv_acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # The outer loop is the one over full and masked runs, so that either's addresses need registers only there.
    for masked in tl.static_range(2):
        for member in range(REPEAT):
            head = kv_head * REPEAT + member
            pivots = prepared + head.to(tl.int64) * tokens_q
            deltas = pivots + HEADS * tokens_q.to(tl.int64)
            for run in range(tl.load(entry + 1 + masked), tl.load(entry + 2 + masked)):
                dk_acc, dv_acc = _dkdv_run(
                    dk_acc,
                    dv_acc,
                    key_rows,
                    value_rows,
                    keys,
                    tl.load(runs + run * 2),
                    tl.load(runs + run * 2 + 1),
                    q + head * stride_qh,
                    dout + head * stride_gh,
                    pivots,
                    deltas,
                    lo,
                    hi,
                    stride_qt,
                    stride_gt,
                    tokens_q,
                    scale * LOG2E,
                    D,
                    BLOCK_D,
                    BLOCK_Q,
                    INTERVALS,
                    masked,
                    PRECISION,
                )
    dk_acc *= scale
    store_rows(dk + kv_head * D, start, tokens_k, row_stride, dk_acc, BLOCK_K, D, BLOCK_D)
    store_rows(dv + kv_head * D, start, tokens_k, row_stride, dv_acc, BLOCK_K, D, BLOCK_D)
