"""Kernels of Megavila: one folder per op, a readable reference beside every fast version."""

from megavila_kernels.interval_attention import IntervalMask, attend, interval_attention

__all__ = ["IntervalMask", "attend", "interval_attention"]
