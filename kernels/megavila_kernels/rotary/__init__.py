"""Rotary position embeddings: rows turned by given angles."""

from megavila_kernels.rotary.interface import rotate

__all__ = ["rotate"]
