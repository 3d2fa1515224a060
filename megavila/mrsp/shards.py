"""Media rows that the ranks of an MR-SP group hold together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavila.mrsp.exchange import exchange_rows
from megavila.runtime.topology import Topology


@dataclass(frozen=True, eq=False)
class ShardedRows:
    """Media rows of a video, a prompt or a micro-batch, of which each rank holds those that it encoded.

    Attributes:
        rows: (n_local, hidden), this rank's; they may carry gradient, then on every rank.
        ranges: for each MR-SP rank the global rows it holds, in the order of its local rows. Where every rank
            encodes everything (mrsp.encode=replicated), one list that covers all.
        num_rows: of all ranks together.
        topology: supplies the MR-SP group.
    """

    rows: Tensor
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    num_rows: int
    topology: Topology

    def __len__(self) -> int:
        """Rows of all ranks together, as of a tensor that holds them all."""
        return self.num_rows

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all rows itself."""
        return len(self.ranges) == 1

    def take(self, wanted: Sequence[Tensor], gradient_from: Sequence[bool] | None = None) -> Tensor:
        """The rows `wanted[r]` on MR-SP rank r (`Topology.mrsp_rank`), (n_wanted, hidden); a collective.

        Args:
            wanted: one int64 tensor of global rows a rank, on the host; the same lists on every rank.
            gradient_from: the ranks whose gradients count; by default the first tensor-parallel rank of each
                context rank. The language model's embeddings have the same, complete gradient on all of a
                tensor group's ranks.
        """
        if self.is_whole:
            mine = wanted[self.topology.mrsp_rank]
            return self.rows.index_select(0, mine.to(self.rows.device))
        if gradient_from is None:
            gradient_from = [rank % self.topology.tensor == 0 for rank in range(self.topology.mrsp_size)]
        return exchange_rows(
            self.rows, self.ranges, wanted, self.topology.mrsp_group, gradient_from=gradient_from
        )

    def whole(self) -> Tensor:
        """All rows on every rank, (num_rows, hidden): for an engine that prefills whole prompts; a collective."""
        if self.is_whole:
            return self.rows
        return self.take([torch.arange(self.num_rows)] * self.topology.mrsp_size)

    @staticmethod
    def join(parts: Sequence["ShardedRows"]) -> "ShardedRows":
        """Rows of at least one part after another."""
        if len(parts) == 1:
            return parts[0]
        ranges: list[list[tuple[int, int]]] = [[] for _ in parts[0].ranges]
        total = 0
        for part in parts:
            for joined, own in zip(ranges, part.ranges, strict=True):
                joined += [(total + start, total + stop) for start, stop in own]
            total += part.num_rows
        rows = torch.cat([part.rows for part in parts])
        return ShardedRows(rows, tuple(map(tuple, ranges)), total, parts[0].topology)


def join_shards(parts: Sequence[ShardedRows | None]) -> ShardedRows | None:
    """`ShardedRows.join` of those that are there, None where none is: a micro-batch of prompts without video."""
    present = [part for part in parts if part is not None]
    return ShardedRows.join(present) if present else None
