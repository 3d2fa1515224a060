"""The public function: shapes are checked here, then Triton or torch computes."""

# Triton's launch syntax, kernel[grid](…), is not in its type stubs, nor that constants are plain numbers.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavila_kernels.choice import use_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Elements that a program turns, in pairs.
BLOCK = 2048


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Turns the pairs (x_i, x_{i + d/2}) of every head by their token's angles.

    Args:
        x: (tokens, heads, d), d even; any strides between tokens and heads.
        cos, sin: (tokens, d / 2), of angles that may come from any positions, fp32 (fp64 for fp64 x).
        backend: "auto" (Triton on CUDA, torch elsewhere), "torch" or "triton".

    Returns:
        (tokens, heads, d) in x's dtype, rounded once; differentiable in x.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, inputs that Triton does not support.
    """
    if x.dim() != 3 or x.shape[2] % 2 or not cos.shape == sin.shape == (x.shape[0], x.shape[2] // 2):
        raise ValueError(
            "expected x (tokens, heads, d) with an even d and cos, sin (tokens, d / 2); "
            f"got {tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    triton = use_triton("rotary", backend, x, unsupported)
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin, triton)  # type: ignore[return-value]
    return _turn(x, cos, sin, triton, backward=False)


class _Rotate(torch.autograd.Function):
    """The backward turns by the opposite angle and needs no activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.triton = triton
        return _turn(x, cos, sin, triton, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _turn(grads[0], *ctx.saved_tensors, ctx.triton, backward=True), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, triton: bool, backward: bool) -> Tensor:
    if triton:
        return _launch(x, cos, sin, backward)
    half = x.shape[-1] // 2
    # bf16 rows are turned in fp32 and rounded once: a rounded cosine would shift far positions visibly.
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x[..., :half].to(dtype), x[..., half:].to(dtype)
    cos, sin = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    sign = -1 if backward else 1
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out.to(x.dtype)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    from megavila_kernels.rotary.triton_kernels import rotate_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, d = x.shape
    out = torch.empty((tokens, heads, d), dtype=x.dtype, device=x.device)
    columns, rows = tile(d)
    if out.numel():
        rotate_kernel[(-(-tokens * heads // rows),)](
            x,
            cos.float().contiguous(),
            sin.float().contiguous(),
            out,
            tokens * heads,
            *x.stride()[:2],
            HEADS=heads,
            HALF=d // 2,
            BLOCK_HALF=columns,
            BLOCK_ROWS=rows,
            BACKWARD=backward,
        )
    return out


def tile(d: int) -> tuple[int, int]:
    """Columns (half of d, padded) and rows of a program's tile."""
    columns = 1 << (d // 2 - 1).bit_length()
    return columns, max(1, BLOCK // columns)


def unsupported(x: Tensor) -> str | None:
    """Why the kernel cannot run on inputs like x, or None."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    return None
