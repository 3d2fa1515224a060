"""Attention strategies over a layout."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megavila_kernels import IntervalMask, attend
from megavila_kernels.interval_attention import get_backend
from torch import Tensor
from torch.autograd.function import once_differentiable

Kept = dict[int, tuple[Tensor, Tensor]]
"""Attention's out and log-sum-exp by layer, from the forward pass for the same layer's recomputation."""


@dataclass(frozen=True, eq=False)
class LocalAttention:
    """All tokens of the layout are on this context rank: one call of the interval kernel a layer.

    kept: see `differentiable`; None keeps nothing.
    """

    mask: IntervalMask
    backend: str = "auto"
    kept: Kept | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (t, heads, d); k, v (t, kv_heads, d); returns (t, heads, d)."""
        if self.kept is not None:
            return differentiable(self, layer, q, k, v, scale, self.kept)
        out, _ = attend(q, k, v, self.mask, scale=scale, backend=self.backend)
        return out

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See `AttentionPass`."""
        return get_backend(self.backend, q).forward(q, k, v, self.mask, scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionPass`."""
        backend = get_backend(self.backend, q)
        rows = backend.row_gradients(dout, None, out, lse)
        result = backend.backward(rows, q, k, v, self.mask, scale)
        return result.dq, result.dk, result.dv


class AttentionPass(Protocol):
    """Attention as two functions without autograd."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out (t, heads, d) in q's dtype and lse (t, heads) in fp32 (fp64 for fp64 inputs)."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq (t, heads, d), dk and dv (t, kv_heads, d) in the inputs' dtype."""
        ...


def differentiable(
    attention: AttentionPass, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, kept: Kept | None
) -> Tensor:
    """out (t, heads, d), differentiable in q, k and v.

    kept: where layers are recomputed, each runs first without gradient, and its out and lse go in here; when it
    runs again, they are taken out, and attention, which at length is most of a layer's work, is not repeated. Of
    one forward pass and its backward pass. None: compute each time.
    """
    if kept is None:
        return _Attend.apply(q, k, v, attention, scale, None)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():
        kept[layer] = attention.forward(q, k, v, scale)
        return kept[layer][0]
    return _Attend.apply(q, k, v, attention, scale, kept.pop(layer, None))  # type: ignore[no-any-return]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention: AttentionPass,
        scale: float,
        known: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        out, lse = attention.forward(q, k, v, scale) if known is None else known
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention, ctx.scale = attention, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.attention.backward(grads[0], q, k, v, out, lse, ctx.scale)
        return dq, dk, dv, None, None, None
