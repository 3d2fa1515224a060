"""Gradients of all trainable parameters in one flat fp32 buffer: accumulation, reduction and clipping.

Losses are normalised over the whole step before they get here, so gradients of micro-batches and of data and
context ranks are summed, never averaged.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavila.runtime.collectives import all_reduce_sum
from megavila.runtime.errors import MegavilaError
from megavila.runtime.topology import Topology

# Parameters start on 256-byte borders: kernels and BLAS take their aligned paths on views of the buffer.
_ALIGNMENT = 64


class GradientError(MegavilaError):
    """Gradients that would ruin the weights."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers."""

    name: str
    parameter: nn.Parameter
    start: int
    decayed: bool  # subject to weight decay
    partial: bool  # each tensor-parallel rank has only its tokens' part of the gradient
    sharded: bool  # each tensor-parallel rank has other elements of this weight

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    def view(self, flat: Tensor) -> Tensor:
        """Return this parameter's elements of ``flat`` in the parameter's shape."""
        return flat[self.start : self.stop].view_as(self.parameter)


class GradientBuffer:
    """Accumulates gradients in fp32 (fp64 for a model in fp64) and reduces them over the topology.

    ``loss.backward()`` may be called any number of times; each parameter's gradient is added to the buffer as
    soon as autograd has it and freed. Then `reduce`, `clip`, the optimizer's step and `zero`.

    Parameters with the attribute ``sequence_parallel = True`` (Megatron's mark of weights that are replicated
    over the tensor group but see only a part of the tokens on each rank) are summed over the tensor group
    first.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        topology: Topology,
        *,
        bucket: int = 1 << 25,
    ) -> None:
        """``bucket`` is the most elements one all-reduce carries."""
        self.topology = topology
        self.bucket = bucket
        self.slots, size = _lay_out(named_parameters)
        if not self.slots:
            raise GradientError(
                "no parameter is trainable; unfreeze the language model, the tower or the projector"
            )
        double = any(slot.parameter.dtype == torch.float64 for slot in self.slots)
        self.flat = torch.zeros(
            size, dtype=torch.float64 if double else torch.float32, device=self.slots[0].parameter.device
        )
        self._partial_end = max((slot.stop for slot in self.slots if slot.partial), default=0)
        self._hooks = [
            slot.parameter.register_post_accumulate_grad_hook(self._accumulator(slot)) for slot in self.slots
        ]

    def _accumulator(self, slot: Slot):
        total = slot.view(self.flat)

        def accumulate(parameter: Tensor) -> None:
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

        return accumulate

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, view of the buffer in the parameter's shape)."""
        for slot in self.slots:
            yield slot.name, slot.view(self.flat)

    def zero(self) -> None:
        self.flat.zero_()

    def reduce(self) -> None:
        """Sum partial gradients over the tensor group, then all over the ranks that hold the same weights."""
        self._all_reduce(self.flat[: self._partial_end], self.topology.tensor_group)
        self._all_reduce(self.flat, self.topology.data_context_group)

    def _all_reduce(self, flat: Tensor, group: dist.ProcessGroup) -> None:
        if group.size() == 1:
            return
        for start in range(0, flat.numel(), self.bucket):
            dist.all_reduce(flat[start : start + self.bucket], group=group)

    def norm(self) -> float:
        """Return the L2 norm of the gradient of the whole model, each weight counted once; after `reduce`."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.flat.device)  # replicated, sharded
        for slot in self.slots:
            squares[int(slot.sharded)] += torch.linalg.vector_norm(slot.view(self.flat)).double() ** 2
        replicated, sharded = squares[0], all_reduce_sum(squares[1], self.topology.tensor_group)
        return float((replicated + sharded).sqrt())

    def clip(self, maximum: float) -> float:
        """Scale all gradients to a norm of at most ``maximum`` (0: never) and return the norm before.

        Raises:
            GradientError: the norm is not finite; the weights are left as they are.
        """
        norm = self.norm()
        if not torch.isfinite(torch.tensor(norm)):
            culprits = [
                name for name, gradient in self.named_gradients() if not torch.isfinite(gradient).all()
            ]
            raise GradientError(
                f"the gradient norm is {norm} (first in {culprits[0] if culprits else 'another rank'}); the "
                "weights were not updated. Lower optimizer.lr, or look for a bad input in this step's rows"
            )
        if maximum > 0.0 and norm > maximum:
            self.flat.mul_(maximum / (norm + 1e-6))
        return norm


def _lay_out(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[Slot], int]:
    """Give every trainable parameter its place: partial ones first, then by weight decay."""
    described = []
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:  # a tied weight has one gradient
            continue
        seen.add(id(parameter))
        partial = bool(getattr(parameter, "sequence_parallel", False))
        described.append((not partial, parameter.ndim > 1, name, parameter))
    slots, start = [], 0
    for not_partial, decayed, name, parameter in sorted(described, key=lambda item: item[:3]):
        sharded = bool(getattr(parameter, "tensor_model_parallel", False))
        slots.append(Slot(name, parameter, start, decayed, not not_partial, sharded))
        start += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    return slots, start
