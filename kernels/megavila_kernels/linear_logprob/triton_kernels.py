"""Logits in registers only: matrix products whose epilogue is the softmax's statistics, or its gradient.

Forward (as in Cut Cross-Entropy: Wijmans et al., 2024): a program multiplies one tile of rows with the vocabulary
tiles of one split, folding each tile of logits into the running maximum, sum of exponentials, sum of
x · exp(x - maximum) and the target's logit; the splits are joined afterwards.

Backward: a program recomputes one tile of logits and writes its gradient. The two products that follow,
with the weight and with the hidden rows, are the BLAS library's.
"""

# Triton's loop constructs are not in its type stubs.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(
    hidden,
    weight,
    rows,
    columns,
    n,
    vocabulary,
    stride_h,
    stride_w,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_VOCAB) of hidden @ weightᵀ in fp32; zeros outside."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * stride_h
    weight_rows = weight + columns.to(tl.int64)[:, None] * stride_w
    row_mask, column_mask = (rows < n)[:, None], (columns < vocabulary)[:, None]
    for start in range(0, SIZE, BLOCK_SIZE):
        feature = start + tl.arange(0, BLOCK_SIZE)
        if SIZE % BLOCK_SIZE == 0:
            a = tl.load(hidden_rows + feature[None, :], mask=row_mask, other=0.0)
            b = tl.load(weight_rows + feature[None, :], mask=column_mask, other=0.0)
        else:
            inside = (feature < SIZE)[None, :]
            a = tl.load(hidden_rows + feature[None, :], mask=row_mask & inside, other=0.0)
            b = tl.load(weight_rows + feature[None, :], mask=column_mask & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n"])
def partials_kernel(
    hidden,
    weight,
    target,
    partials,
    n,
    vocabulary,
    stride_h,
    stride_w,
    scale,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partials (splits, 4, n): maximum, Σ exp(x - maximum), the target's x, Σ x exp(x - maximum), for
    x = scale · logit over the SPLIT tokens of a split. The target's is 0 where the target is elsewhere."""
    # Row tiles vary fastest: programs that run at the same time read the same part of the weight.
    tiles = tl.cdiv(n, BLOCK_ROWS)
    split = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = rows < n
    wanted = tl.load(target + rows, mask=real, other=-1)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    picked = tl.zeros((BLOCK_ROWS,), tl.float32)
    end = tl.minimum((split + 1) * SPLIT, vocabulary)
    for start in range(split * SPLIT, end, BLOCK_VOCAB):
        columns = start + tl.arange(0, BLOCK_VOCAB)
        x = scale * _logits(
            hidden,
            weight,
            rows,
            columns,
            n,
            vocabulary,
            stride_h,
            stride_w,
            SIZE,
            BLOCK_ROWS,
            BLOCK_VOCAB,
            BLOCK_SIZE,
            PRECISION,
        )
        inside = (columns < vocabulary)[None, :]
        picked += tl.sum(tl.where(columns[None, :] == wanted[:, None], x, 0.0), 1)
        new_top = tl.maximum(top, tl.max(tl.where(inside, x, float("-inf")), 1))
        exponentials = tl.where(inside, tl.exp2((x - new_top[:, None]) * LOG2E), 0.0)
        shrink = tl.exp2((top - new_top) * LOG2E)
        total = total * shrink + tl.sum(exponentials, 1)
        weighted = weighted * shrink + tl.sum(x * exponentials, 1)
        top = new_top
    base = partials + split.to(tl.int64) * 4 * n + rows
    tl.store(base, top, mask=real)
    tl.store(base + n, total, mask=real)
    tl.store(base + 2 * n, picked, mask=real)
    tl.store(base + 3 * n, weighted, mask=real)


@triton.jit(do_not_specialize=["n"])
def gradient_kernel(
    hidden,
    weight,
    target,
    lse,
    entropy,
    d_logprob,
    d_entropy,
    d_logits,
    n,
    vocabulary,
    stride_h,
    stride_w,
    scale,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_logits = scale · (onehot · d_logprob - p · (d_logprob + d_entropy · (log p + entropy)))."""
    tiles = tl.cdiv(n, BLOCK_ROWS)
    rows = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (tl.program_id(0) // tiles) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    real = rows < n
    logits = _logits(
        hidden,
        weight,
        rows,
        columns,
        n,
        vocabulary,
        stride_h,
        stride_w,
        SIZE,
        BLOCK_ROWS,
        BLOCK_VOCAB,
        BLOCK_SIZE,
        PRECISION,
    )
    log_p = scale * logits - tl.load(lse + rows, mask=real, other=0.0)[:, None]
    upstream = tl.load(d_logprob + rows, mask=real, other=0.0)[:, None]
    wanted = tl.load(target + rows, mask=real, other=-1)[:, None]
    gradient = upstream
    if WITH_ENTROPY:
        h = tl.load(entropy + rows, mask=real, other=0.0)[:, None]
        gradient = gradient + tl.load(d_entropy + rows, mask=real, other=0.0)[:, None] * (log_p + h)
    gradient = tl.where(columns[None, :] == wanted, upstream, 0.0) - tl.exp2(log_p * LOG2E) * gradient
    pointers = d_logits + rows.to(tl.int64)[:, None] * vocabulary + columns[None, :]
    mask = real[:, None] & (columns < vocabulary)[None, :]
    tl.store(pointers, (gradient * scale).to(d_logits.dtype.element_ty), mask=mask)
