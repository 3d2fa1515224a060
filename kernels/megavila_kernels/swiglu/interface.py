"""The public function, on Triton or torch."""

# Triton's launch syntax, kernel[grid](…), is not in its type stubs, nor that constants are plain numbers.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavila_kernels.choice import use_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Columns of a program.
BLOCK = 1024


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """[gate | up] (…, 2n) -> silu(gate) · up (…, n).

    backend: "auto" (Triton on CUDA, torch elsewhere), "torch" or "triton". Differentiable; keeps only its input
    for the backward pass. The kernels compute in fp32 and round once; in torch half precision rounds in between.

    Raises ValueError for an odd last dimension, an unknown backend, or a dtype that Triton does not support.
    """
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"expected (…, 2n) with gate and up side by side; got {tuple(gate_up.shape)}")
    triton = use_triton("SwiGLU", backend, gate_up, unsupported)
    if torch.is_grad_enabled():
        return _SwiGlu.apply(gate_up, triton)  # type: ignore[return-value]
    return _forward(gate_up, triton)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.triton = triton
        return _forward(gate_up, triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _backward(grads[0], *ctx.saved_tensors, ctx.triton), None


def _forward(gate_up: Tensor, triton: bool) -> Tensor:
    if not triton:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    from megavila_kernels.swiglu.triton_kernels import forward_kernel

    rows = _rows(gate_up)
    n = rows.shape[1] // 2
    out = torch.empty((*gate_up.shape[:-1], n), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        forward_kernel[(len(rows), -(-n // BLOCK))](rows, out, rows.stride(0), n, BLOCK=BLOCK)
    return out


def _backward(dout: Tensor, gate_up: Tensor, triton: bool) -> Tensor:
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if not triton:
        # No copy of the two halves.
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), dout, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(dout * up, gate))
        return out
    from megavila_kernels.swiglu.triton_kernels import backward_kernel

    rows, upstream = _rows(gate_up), _rows(dout)
    n = upstream.shape[1]
    if out.numel():
        grid = (len(rows), -(-n // BLOCK))
        backward_kernel[grid](upstream, rows, out, upstream.stride(0), rows.stride(0), n, BLOCK=BLOCK)
    return out


def _rows(x: Tensor) -> Tensor:
    """(rows, columns) with contiguous rows; a view where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot run on inputs like x, or None."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    return None
