"""What every implementation of interval attention offers, so that context-parallel code need not know which runs.

A softmax over keys that arrive in parts (the steps of a ring) is a chain of `accumulate` calls on one
`AttentionState`, ended by `finish`; `forward` does both at once for the last or only part. The backward pass
adds each part's share to fp32 `Gradients`. Nothing is rounded to the input dtype in between, so the error does
not grow with the number of parts.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megavila_kernels.interval_attention.mask import IntervalMask


@dataclass(frozen=True)
class AttentionState:
    """An unfinished softmax: out = acc / total, lse = ln 2 · (top + log2 total).

    acc: (tokens_q, heads, d); top, total: (tokens_q, heads); fp32, or fp64 for fp64 inputs. `top` is the
    largest score seen so far in units of log 2, -inf where nothing was seen. `accumulate` owns the tensors: it
    may update them in place.
    """

    acc: Tensor
    top: Tensor
    total: Tensor


@dataclass(frozen=True)
class RowGradients:
    """What the backward pass needs to know about the query rows, over all keys they have seen.

    dout, out: (tokens_q, heads, d). lse: (tokens_q, heads), natural logarithm, -inf for
    rows that saw nothing. dlse: its upstream gradient or None. prepared: what the backend has computed of them,
    in a form of its own.
    """

    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None
    prepared: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """dq (tokens_q, heads, d), dk and dv (tokens_k, kv_heads, d)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Backend(Protocol):
    """One implementation. Shapes throughout: q (tokens_q, heads, d), k and v (tokens_k, kv_heads, d)."""

    def accumulate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float, state: AttentionState | None
    ) -> AttentionState:
        """The state after these keys too; None starts a new softmax."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`finish(accumulate(…))`: out in q's dtype, natural-log lse in the state's."""
        ...

    def row_gradients(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> RowGradients:
        """Gathers the upstream gradients; once per backward pass, for all parts of the keys."""
        ...

    def backward(
        self,
        rows: RowGradients,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        into: Gradients | None = None,
    ) -> Gradients:
        """These keys' exact share of the gradients.

        Added in place to `into`, whose tensors are contiguous and of the state's dtype, if given; otherwise
        new tensors in the inputs' dtype.
        """
        ...


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def finish(state: AttentionState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out in `dtype` (0 for rows that saw nothing) and natural-log lse (-inf for those rows)."""
    empty = state.total == 0
    out = state.acc / state.total.masked_fill(empty, 1.0)[..., None]
    top = state.top.masked_fill(empty, 0.0)
    # log2(0) = -inf is the lse of an empty row.
    return out.to(dtype), (top + state.total.log2()).mul_(math.log(2.0))


def zero_gradients(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Accumulators for `Backend.backward(…, into=…)`."""

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=accumulation_dtype(x), device=x.device)

    return Gradients(zeros(q), zeros(k), zeros(v))
