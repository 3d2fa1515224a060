"""Rotation of pairs (x_i, x_{i + d/2}) in one pass over memory (RoFormer: Su et al., 2021).

    y_i = x_i cos - x_{i + d/2} sin;   y_{i + d/2} = x_{i + d/2} cos + x_i sin

The angles are read, not computed: one table serves all heads and layers, whichever positions it was made of, and
fp32 cosines of far positions need more care than a kernel should take at every layer.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    stride_xt,
    stride_xh,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Rows are (token, head) pairs; BACKWARD turns by the opposite angle. out is contiguous."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    column = tl.arange(0, BLOCK_HALF)[None, :]
    real = (row < rows)[:, None] & (column < HALF)
    source = x + (token * stride_xt + head * stride_xh)[:, None] + column
    first = tl.load(source, mask=real, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=real, other=0.0).to(tl.float32)
    angle = token[:, None] * HALF + column
    c = tl.load(cos + angle, mask=real, other=0.0)
    s = tl.load(sin + angle, mask=real, other=0.0)
    if BACKWARD:
        s = -s
    target = out + row.to(tl.int64)[:, None] * (2 * HALF) + column
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=real)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=real)
