"""Rows changed each time they are drawn: other numbers of frames, for example."""

import math
from collections.abc import Callable, Sequence

from megavila.data.dataset import GroupSampler
from megavila.data.row import Row
from megavila.runtime.seeds import derive_seed

RowTransform = Callable[[Row, int], Row]
"""`data.transform`: (row, seed of this visit) -> the row to be used in its place."""


class TransformedSampler(GroupSampler):
    """A `GroupSampler` whose rows go through a transform with a seed of (run, epoch, row).

    The seed depends on nothing else, so a row looks the same however rows are batched or spread over ranks.
    """

    def __init__(self, rows: Sequence[Row], seed: int, transform: RowTransform) -> None:
        super().__init__(rows, seed)
        self._transform = transform
        self._transform_seed = derive_seed(seed, "transform")

    def next(self, n: int) -> list[Row]:
        """The next ``n`` rows, transformed."""
        drawn = []
        for _ in range(n):
            (row,) = super().next(1)
            epoch = math.ceil(self.epoch) - 1  # that of the row just drawn
            drawn.append(self._transform(row, derive_seed(self._transform_seed, epoch, row.problem_id)))
        return drawn
