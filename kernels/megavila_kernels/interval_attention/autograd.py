"""The differentiable form of interval attention, over any backend."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavila_kernels.interval_attention.backend import Backend
from megavila_kernels.interval_attention.mask import IntervalMask


class Attend(torch.autograd.Function):
    """(q, k, v) -> (out, lse); gradients may arrive at both."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        out, lse = backend.forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.backend = mask, scale, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dout, dlse = grads
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None, None
        if dout is None:
            dout = torch.zeros_like(out)
        rows = ctx.backend.row_gradients(dout, dlse, out, lse)
        result = ctx.backend.backward(rows, q, k, v, ctx.mask, ctx.scale)
        return result.dq, result.dk, result.dv, None, None, None
