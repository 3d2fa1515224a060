"""Interval attention: every query row sees one or several intervals of the keys."""

from megavila_kernels.interval_attention.backend import (
    AttentionState,
    Backend,
    Gradients,
    RowGradients,
    finish,
    zero_gradients,
)
from megavila_kernels.interval_attention.interface import attend, get_backend, interval_attention
from megavila_kernels.interval_attention.mask import IntervalMask

__all__ = [
    "AttentionState",
    "Backend",
    "Gradients",
    "IntervalMask",
    "RowGradients",
    "attend",
    "finish",
    "get_backend",
    "interval_attention",
    "zero_gradients",
]
