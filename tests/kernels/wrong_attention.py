"""Attention with one thing wrong each: what test_regressions.py must notice.

Every class is our torch backend but for the mistake its docstring names.
"""

import math
from dataclasses import replace

import torch
from megavila_kernels.interval_attention import AttentionState, Gradients, IntervalMask, RowGradients
from megavila_kernels.interval_attention.torch_backend import TorchBackend
from torch import Tensor

LOG2E = math.log2(math.e)
TILE = 16


class StaleKeys(TorchBackend):
    """The backward pass of a ring reads the keys of the step before: the next ones had not arrived."""

    held: tuple[Tensor, Tensor] | None = None

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
        stale = self.held or (k, v)
        self.held = (k, v)
        return super().backward(rows, q, *stale, mask, scale, into)


class HalfPrecisionPartials(TorchBackend):
    """Outputs and gradients of every step of a ring are rounded to fp16."""

    def accumulate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float, state: AttentionState | None
    ) -> AttentionState:
        state = super().accumulate(q, k, v, mask, scale, state)
        return replace(state, acc=state.acc.half().to(state.acc.dtype))

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
        grads = super().backward(rows, q, k, v, mask, scale, into)
        for x in (grads.dq, grads.dk, grads.dv):
            x.copy_(x.half())
        return grads


class ChangedForward(TorchBackend):
    """`changed` replaces out and lse."""

    def changed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.changed(*super().forward(q, k, v, mask, scale, state))


class NanForEmptyRows(ChangedForward):
    """-inf - -inf in the softmax of a row that sees nothing."""

    def changed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out + (lse - lse)[..., None].to(out.dtype), lse


class ZeroLseForEmptyRows(ChangedForward):
    """As torch's flash attention on a CPU: a later merge then gives the row's zeros weight 1."""

    def changed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out, lse.masked_fill(lse == float("-inf"), 0.0)


class Base2Lse(ChangedForward):
    """The kernel's own units at the border."""

    def changed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out, lse * LOG2E


class UnguardedMerge(TorchBackend):
    """-inf - -inf when two parts are joined of which a row sees neither."""

    def accumulate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float, state: AttentionState | None
    ) -> AttentionState:
        state = super().accumulate(q, k, v, mask, scale, state)
        nothing = state.top - state.top  # 0, or nan where top is -inf
        return AttentionState(state.acc + nothing[..., None], state.top, state.total + nothing)


class ChangedGradients(TorchBackend):
    """`changed_rows` replaces what the backward pass reads, `changed` the gradients that it returns."""

    def changed_rows(self, rows: RowGradients) -> RowGradients:
        return rows

    def changed(self, grads: Gradients, rows: RowGradients, mask: IntervalMask) -> Gradients:
        return grads

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
        grads = super().backward(self.changed_rows(rows), q, k, v, mask, scale, into)
        return self.changed(grads, rows, mask)


class NanGradientsForEmptyRows(ChangedGradients):
    """exp(s - lse) with lse = -inf."""

    def changed(self, grads: Gradients, rows: RowGradients, mask: IntervalMask) -> Gradients:
        return replace(grads, dq=grads.dq + (rows.lse - rows.lse)[..., None].to(grads.dq.dtype))


class ReadsBase2Lse(ChangedGradients):
    """The backward pass takes the natural logarithm for one to the base 2."""

    def changed_rows(self, rows: RowGradients) -> RowGradients:
        return replace(rows, lse=rows.lse / LOG2E)


class Bf16Dq(ChangedGradients):
    """A dtype that was written into the kernel."""

    def changed(self, grads: Gradients, rows: RowGradients, mask: IntervalMask) -> Gradients:
        return replace(grads, dq=grads.dq.bfloat16())


class DqThroughBf16(ChangedGradients):
    """The same, hidden by a cast."""

    def changed(self, grads: Gradients, rows: RowGradients, mask: IntervalMask) -> Gradients:
        return replace(grads, dq=grads.dq.bfloat16().to(grads.dq.dtype))


class PaddingGradientsUnwritten(ChangedGradients):
    """Gradients of rows and keys that take no part are what the memory held."""

    def changed(self, grads: Gradients, rows: RowGradients, mask: IntervalMask) -> Gradients:
        visible = mask.visible()
        for x, axis in ((grads.dq, 1), (grads.dk, 0), (grads.dv, 0)):
            x[~visible.any(dim=axis)] = 1e-3
        return grads


class OverwritesAccumulators(TorchBackend):
    """The gradients of the last step of a ring, not the sum over its steps."""

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
        grads = super().backward(rows, q, k, v, mask, scale)
        if into is None:
            return grads
        return Gradients(into.dq.copy_(grads.dq), into.dk.copy_(grads.dk), into.dv.copy_(grads.dv))


class TailOfDkUnwritten(ChangedGradients):
    """dk and dv are stored in whole tiles only."""

    def changed(self, grads: Gradients, rows: RowGradients, mask: IntervalMask) -> Gradients:
        tail = mask.tokens_k // TILE * TILE
        grads.dk[tail:] = 0
        grads.dv[tail:] = 0
        return grads


class OtherMask(TorchBackend):
    """`forward_bounds` and `backward_bounds` replace lo and hi (n, tokens_q) in the two passes."""

    def bounds(self, lo: Tensor, hi: Tensor, tokens_k: int) -> tuple[Tensor, Tensor]:
        return lo, hi

    forward_bounds = bounds
    backward_bounds = bounds

    def accumulate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float, state: AttentionState | None
    ) -> AttentionState:
        other = IntervalMask(*self.forward_bounds(mask.lo, mask.hi, mask.tokens_k), mask.tokens_k)
        return super().accumulate(q, k, v, other, scale, state)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, Tensor]:
        if state is not None:
            return super().forward(q, k, v, mask, scale, state)  # by accumulate, which changes the mask
        other = IntervalMask(*self.forward_bounds(mask.lo, mask.hi, mask.tokens_k), mask.tokens_k)
        return super().forward(q, k, v, other, scale)

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
        other = IntervalMask(*self.backward_bounds(mask.lo, mask.hi, mask.tokens_k), mask.tokens_k)
        return super().backward(rows, q, k, v, other, scale, into)


class CausalBackward(OtherMask):
    """The backward kernel masks causally whatever the forward pass did."""

    def backward_bounds(self, lo: Tensor, hi: Tensor, tokens_k: int) -> tuple[Tensor, Tensor]:
        row = torch.arange(lo.shape[1], dtype=torch.int32, device=lo.device)
        return lo, torch.minimum(hi, row + 1)


class PaddingAttends(OtherMask):
    """Rows that see nothing see what the row before them sees."""

    def bounds(self, lo: Tensor, hi: Tensor, tokens_k: int) -> tuple[Tensor, Tensor]:
        lo, hi = lo.clone(), hi.clone()
        for row in range(1, lo.shape[1]):
            if bool((hi[:, row] <= lo[:, row]).all()):
                lo[:, row], hi[:, row] = lo[:, row - 1], hi[:, row - 1]
        return lo, hi

    forward_bounds = bounds
    backward_bounds = bounds


class WholeTilesSeen(OtherMask):
    """A tile is masked as a whole: keys beyond the interval's end are seen up to the end of their tile."""

    def bounds(self, lo: Tensor, hi: Tensor, tokens_k: int) -> tuple[Tensor, Tensor]:
        whole = (-(-hi // TILE) * TILE).clamp_max(tokens_k)
        return lo, torch.where(hi > lo, whole, hi)

    forward_bounds = bounds
    backward_bounds = bounds


class TailOfKeysDropped(OtherMask):
    """Keys beyond the last whole tile are never read."""

    def bounds(self, lo: Tensor, hi: Tensor, tokens_k: int) -> tuple[Tensor, Tensor]:
        return lo, hi.clamp_max(tokens_k // TILE * TILE)

    forward_bounds = bounds
    backward_bounds = bounds


class ZeroKeysCounted(TorchBackend):
    """The zeros that fill up the last tile of keys take part in the softmax."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, Tensor]:
        filled = -(-mask.tokens_k // TILE) * TILE
        k, v = (torch.cat([x, x.new_zeros(filled - len(x), *x.shape[1:])]) for x in (k, v))
        hi = torch.where(mask.hi == mask.tokens_k, filled, mask.hi).int()
        return super().forward(q, k, v, IntervalMask(mask.lo, hi, filled), scale, state)
