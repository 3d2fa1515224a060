"""Interval attention: every query row sees one or several intervals of the keys."""

from megavila_kernels.interval_attention.interface import attend, interval_attention
from megavila_kernels.interval_attention.mask import IntervalMask

__all__ = ["IntervalMask", "attend", "interval_attention"]
