"""Ring attention: each rank keeps its queries while the ranks' keys and values pass by.

At step i rank r holds the block of rank r - i, attends to what its queries see of it and joins the result to
what it has, in fp32: out and log-sum-exp are rounded once, after the last step, so the error does not grow
with the number of ranks. In the backward pass the blocks go round again, each with an fp32 accumulator of its
dK and dV behind it, which comes home after the last step. Given the final out and log-sum-exp the partial
gradients of each block are exact.

A block is all that a rank holds, prompt and responses alike. To gather the responses' keys beforehand and send
only the prompt's round moves the same number of bytes, in two mechanisms instead of one and with a gather that
nothing hides.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megavila_kernels import IntervalMask
from megavila_kernels.interval_attention import AttentionState, Gradients, finish, get_backend
from torch import Tensor

from megavila.mrsp.attention import Kept, differentiable
from megavila.runtime.errors import MegavilaError

# Those that can continue a softmax.
BACKENDS = ("auto", "torch", "triton")


class Transfer(Protocol):
    """A send or a receive on its way."""

    def wait(self) -> Any:
        """Return when the tensor may be read or written again."""
        ...


class Neighbours(Protocol):
    """This rank's place in the ring and its connection to the ranks beside it."""

    rank: int
    size: int

    def shift(self, send: Tensor, receive: Tensor) -> Sequence[Transfer]:
        """Start to send to the next rank and to receive from the one before; both contiguous."""
        ...


class GroupNeighbours:
    """`Neighbours` over a process group of at least two ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self._previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def shift(self, send: Tensor, receive: Tensor) -> Sequence[Transfer]:
        """See `Neighbours`. An empty block is not sent; its size is known on both sides."""
        transfers = []
        if send.numel():
            transfers.append(dist.P2POp(dist.isend, send, self._next, self.group))
        if receive.numel():
            transfers.append(dist.P2POp(dist.irecv, receive, self._previous, self.group))
        return dist.batch_isend_irecv(transfers) if transfers else []


class RingAttention:
    """Attention strategy over a ring of at least two ranks.

    Args:
        neighbours: the connection; every rank must call the strategy, and its backward pass, in the same order.
        masks: for each rank of the ring what this rank's queries see of its block, None for nothing.
        block_sizes: tokens of each rank of the ring. Rows of q, k and v beyond this rank's own are padding:
            they take no part and come out as zeros.
        backend: of the interval kernel, as `model.attention_backend`.
        kept: see `differentiable`; a layer's recomputation then does without its ring.

    Raises MegavilaError for a backend that cannot continue a softmax.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        masks: Sequence[IntervalMask | None],
        block_sizes: Sequence[int],
        backend: str = "auto",
        kept: Kept | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise MegavilaError(
                f"ring attention has no backend {backend!r}; use model.attention_backend auto, or "
                "parallel.cp_comm_type a2a (Ulysses)"
            )
        self.neighbours = neighbours
        self.masks = masks
        self.block_sizes = block_sizes
        self.backend = backend
        self.kept = kept
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (t, heads, d); k, v (t, kv_heads, d); returns (t, heads, d)."""
        padding = len(q) - self.block_sizes[self.neighbours.rank]
        if padding:
            q, k, v = (x[:-padding] for x in (q, k, v))
        out = differentiable(self, layer, q, k, v, scale, self.kept)
        return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See `AttentionPass`."""
        backend = get_backend(self.backend, q)
        state: AttentionState | None = None
        block = torch.stack((k, v))
        for step in range(self.neighbours.size):
            following, transfers = self._pass_on(block, step)
            mask = self._mask_at(step)
            if mask is not None:
                state = backend.accumulate(q, block[0], block[1], mask, scale, state)
            _wait(transfers)
            block = following
        if state is None:  # no tokens here
            lse = torch.full(q.shape[:2], float("-inf"), dtype=_accumulation_dtype(q), device=q.device)
            return torch.zeros_like(q), lse
        return finish(state, q.dtype)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionPass`."""
        dtype, backend = _accumulation_dtype(q), get_backend(self.backend, q)
        rows = backend.row_gradients(dout, None, out, lse)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        block = torch.stack((k, v))
        gradient = self._buffer("gradients", 0, self.neighbours.rank, k, dtype).zero_()
        arriving: Sequence[Transfer] = ()
        for step in range(self.neighbours.size):
            following, transfers = self._pass_on(block, step)
            mask, share = self._mask_at(step), None
            if mask is not None:
                share = self._buffer("share", 0, self._holder_at(step), k, dtype).zero_()
                into = Gradients(dq, share[0], share[1])
                backend.backward(rows, q, block[0], block[1], mask, scale, into)
            _wait(arriving)  # what the ranks before have added to this block's gradient
            if share is not None:
                gradient += share
            received = self._buffer("gradients", step + 1, self._holder_at(step + 1), k, dtype)
            arriving = self.neighbours.shift(gradient, received)
            gradient = received
            _wait(transfers)
            block = following
        _wait(arriving)
        # dK and dV lie in buffers that the next layer writes to.
        dk, dv = (part.to(k.dtype, copy=True) for part in gradient)
        return dq.to(q.dtype), dk, dv

    def _holder_at(self, step: int) -> int:
        """Whose block is here at a step."""
        return (self.neighbours.rank - step) % self.neighbours.size

    def _mask_at(self, step: int) -> IntervalMask | None:
        return self.masks[self._holder_at(step)]

    def _pass_on(self, block: Tensor, step: int) -> tuple[Tensor, Sequence[Transfer]]:
        """Send the block of a step on and receive the next one, unless this is the last."""
        if step + 1 == self.neighbours.size:
            return block, ()
        following = self._buffer("blocks", step, self._holder_at(step + 1), block[0], block.dtype)
        return following, self.neighbours.shift(block, following)

    def _buffer(self, name: str, step: int, holder: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """(2, tokens of the holder, kv_heads, d), one of two that alternate and serve all layers."""
        row = like.shape[1] * like.shape[2]
        size = 2 * max(self.block_sizes) * row
        buffers = self._buffers.get((name, dtype))
        if buffers is None or buffers.shape[1] < size:
            buffers = torch.empty(2, size, dtype=dtype, device=like.device)
            self._buffers[name, dtype] = buffers
        tokens = self.block_sizes[holder]
        return buffers[step % 2, : 2 * tokens * row].view(2, tokens, *like.shape[1:])


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wait(transfers: Sequence[Transfer]) -> None:
    for transfer in transfers:
        transfer.wait()
