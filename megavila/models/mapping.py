"""Declarative parameter mappings between this package's parameters and Hugging Face names.

One table of mappings per model family serves import, export, weight transfer to a rollout engine and
initialisation. A mapping knows how the tensors that carry one parameter in a checkpoint are fused and cut for
tensor parallelism.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]
Initializer = Callable[[torch.Tensor, torch.Generator], None]
"""Fills a full, unsharded fp32 checkpoint tensor in place from the generator."""


@dataclass(frozen=True)
class Mapping(ABC):
    """One native parameter and the checkpoint tensors it is made of.

    native: name in `VisionLanguageModel.named_parameters()`.
    hf: names of the checkpoint tensors, prefix included.
    shapes: their full shapes.
    init: how each of them is initialised.
    """

    native: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    init: Initializer

    @abstractmethod
    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        """Checkpoint tensors -> the parameter on `rank` of a tensor-parallel group of `degree` ranks."""

    @abstractmethod
    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Every rank's parameter, in rank order -> checkpoint tensors, which may share memory with it."""

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different parts, so that exporting must gather."""
        return True


@dataclass(frozen=True)
class Replicated(Mapping):
    """The same tensor on every rank."""

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        return tensors[0]

    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (shards[0],)

    @property
    def is_sharded(self) -> bool:
        return False


@dataclass(frozen=True)
class Stacked(Mapping):
    """Tensors stacked along their first dimension, replicated: the tower's fused q, k, v projection."""

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        return torch.cat(list(tensors))

    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return shards[0].split([shape[0] for shape in self.shapes])

    @property
    def is_sharded(self) -> bool:
        return False


@dataclass(frozen=True)
class Row(Mapping):
    """A weight cut along its input dimension (Megatron's RowParallelLinear)."""

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        return tensors[0].chunk(degree, dim=1)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (_join(shards, dim=1),)


@dataclass(frozen=True)
class Column(Mapping):
    """A weight or bias cut along its output dimension (Megatron's ColumnParallelLinear)."""

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        return tensors[0].chunk(degree)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (_join(shards),)


@dataclass(frozen=True)
class Vocab(Mapping):
    """An embedding table: padded with zero rows to a multiple of the degree, then cut by rows."""

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        (table,) = tensors
        padding = table.new_zeros(-table.shape[0] % degree, *table.shape[1:])
        return torch.cat([table, padding]).chunk(degree)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (_join(shards)[: self.shapes[0][0]],)


@dataclass(frozen=True)
class GatedMlp(Mapping):
    """Gate and up projections: every rank holds its part of the gate above its part of up."""

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        return torch.cat([tensor.chunk(degree)[rank] for tensor in tensors])

    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return _join([gate for gate, _ in halves]), _join([up for _, up in halves])


@dataclass(frozen=True)
class Qkv(Mapping):
    """Query, key and value projections interleaved by key/value head, then cut by rows.

    For each kv head: its query heads, its key head, its value head (Megatron's linear_qkv). With fewer kv
    heads than ranks a cut goes through a group, which Megatron-core joins again in the forward pass.

    kv_heads: key/value heads of the whole model.
    """

    kv_heads: int

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, degree: int) -> torch.Tensor:
        groups = [tensor.unflatten(0, (self.kv_heads, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1).chunk(degree)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        sizes = [shape[0] // self.kv_heads for shape in self.shapes]
        parts = _join(shards).unflatten(0, (self.kv_heads, -1)).split(sizes, dim=1)
        return tuple(part.flatten(0, 1) for part in parts)


def _join(shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)
