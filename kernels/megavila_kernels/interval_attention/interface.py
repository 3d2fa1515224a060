"""The public functions: shapes are checked here, then a backend computes."""

import math

from torch import Tensor

from megavila_kernels.choice import use_triton
from megavila_kernels.interval_attention.autograd import Attend
from megavila_kernels.interval_attention.backend import Backend
from megavila_kernels.interval_attention.mask import IntervalMask
from megavila_kernels.interval_attention.reference import reference_attend
from megavila_kernels.interval_attention.torch_backend import TorchBackend
from megavila_kernels.interval_attention.triton_config import unsupported

BACKENDS = ("auto", "torch", "triton", "reference")


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention in which query row i sees the keys [lo[i], hi[i]).

    Args:
        q: (tokens_q, heads, d).
        k, v: (tokens_k, kv_heads, d); kv_heads divides heads, query head h reads K/V head h // (heads //
            kv_heads).
        lo, hi: int32 (tokens_q,), half open; hi <= lo means that the row sees nothing.
        scale: factor of the scores, 1/sqrt(d) if None.
        backend: "auto" (Triton on CUDA, torch elsewhere), "torch", "triton" or "reference" (dense; for tests).

    Returns:
        out (tokens_q, heads, d) in q's dtype, 0 for rows that see nothing, and lse (tokens_q, heads), the
        natural logarithm of the softmax denominator in fp32 (fp64 for fp64 inputs), -inf for rows that see
        nothing. Both are differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an interval outside the keys, an unknown
            backend.
    """
    if lo.dim() != 1 or lo.shape != hi.shape:
        raise ValueError(f"lo and hi must both be (tokens_q,); got {tuple(lo.shape)} and {tuple(hi.shape)}")
    return attend(q, k, v, IntervalMask(lo[None], hi[None], k.shape[0]), scale=scale, backend=backend)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`interval_attention` over the union of several intervals a row; the mask's plan is shared by all calls
    with it."""
    _check(q, k, v, mask)
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; use one of {sorted(BACKENDS)}")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend == "reference":
        return reference_attend(q, k, v, mask, scale)
    return Attend.apply(q, k, v, mask, scale, get_backend(backend, q))  # type: ignore[return-value]


def get_backend(name: str, q: Tensor) -> Backend:
    """The implementation called `name` for queries like q; "auto" chooses by device, dtype and head dimension.

    Raises ValueError where "triton" cannot run on q. Where "auto" on a GPU must do without Triton, it warns
    once with the reason.
    """
    if not use_triton("attention", name, q, unsupported):
        return TorchBackend()
    from megavila_kernels.interval_attention.triton_backend import TritonBackend

    return TritonBackend()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "expected q (tokens_q, heads, d) and k, v (tokens_k, kv_heads, d); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} K/V heads evenly; the second must divide the first"
        )
    if (q.shape[0], k.shape[0]) != (mask.tokens_q, mask.tokens_k):
        raise ValueError(
            f"the mask is for {mask.tokens_q} queries and {mask.tokens_k} keys; got {q.shape[0]} and {k.shape[0]}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share a floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
