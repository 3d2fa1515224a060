"""SwiGLU, the gated activation of a decoder's MLP."""

from megavila_kernels.swiglu.interface import swiglu

__all__ = ["swiglu"]
