"""Whether an op runs on its Triton kernels or on plain torch."""

import warnings
from collections.abc import Callable
from functools import cache

from torch import Tensor


def use_triton(op: str, backend: str, x: Tensor, unsupported: Callable[[Tensor], str | None]) -> bool:
    """True for the Triton kernels of `op`, False for torch.

    "auto" takes Triton on CUDA and torch elsewhere; where it must do without Triton on a GPU, it warns once with
    the reason. `unsupported` says why the kernels cannot run on inputs like x, or None.

    Raises ValueError for an unknown backend, and where "triton" is asked for and cannot run on x.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown {op} backend {backend!r}; use auto, torch or triton")
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return False
    reason = _triton_missing() or unsupported(x)
    if reason is None:
        return True
    if backend == "triton":
        raise ValueError(f"the Triton {op} kernels cannot run: {reason}; use backend='torch'")
    _warn_once(f"{op} runs on plain torch, much slower than the Triton kernels: {reason}")
    return False


@cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
