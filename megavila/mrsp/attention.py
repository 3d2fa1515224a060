"""Attention strategies over a layout."""

from dataclasses import dataclass

from megavila_kernels import IntervalMask, attend
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LocalAttention:
    """All tokens of the layout are on this context rank: one call of the interval kernel a layer."""

    mask: IntervalMask
    backend: str = "auto"

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (t, heads, d); k, v (t, kv_heads, d); returns (t, heads, d)."""
        out, _ = attend(q, k, v, self.mask, scale=scale, backend=self.backend)
        return out
