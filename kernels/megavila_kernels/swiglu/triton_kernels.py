"""SwiGLU in one pass over memory, forward and backward (Shazeer, 2020), on rows that hold [gate | up].

out = silu(gate) · up,  silu(g) = g σ(g)
d_up = dout · silu(gate);   d_gate = dout · up · σ(gate) (1 + gate (1 - σ(gate)))
"""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(gate_up, out, stride_x, n, BLOCK: tl.constexpr):
    """out (rows, n); grid (rows, blocks of columns)."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    source = gate_up + row * stride_x + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + n, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * n + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(dout, gate_up, d_gate_up, stride_g, stride_x, n, BLOCK: tl.constexpr):
    """d_gate_up (rows, 2n), of the same order as gate_up; grid as above."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    source = gate_up + row * stride_x + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + n, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dout + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = upstream * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    target = d_gate_up + row * 2 * n + column
    dtype = d_gate_up.dtype.element_ty
    tl.store(target, d_gate.to(dtype), mask=inside)
    tl.store(target + n, (upstream * gate * sigmoid).to(dtype), mask=inside)
