"""Rows changed each time they are drawn: other numbers of frames, for example."""

import math
from collections.abc import Callable
from typing import Any

from megavila.data.dataset import GroupSampler
from megavila.data.row import Row
from megavila.runtime.seeds import derive_seed

RowTransform = Callable[[Row, int], Row]
"""(row, seed of this visit) -> the row to be used in its place."""


class TransformedSampler:
    """A `GroupSampler` whose rows go through a transform with a seed of (run, epoch, row).

    The seed depends on nothing else, so a row looks the same however rows are batched or spread over ranks.
    """

    def __init__(self, sampler: GroupSampler, transform: RowTransform, seed: int) -> None:
        self._sampler = sampler
        self._transform = transform
        self._seed = seed

    @property
    def num_rows(self) -> int:
        return self._sampler.num_rows

    @property
    def epoch(self) -> float:
        return self._sampler.epoch

    def next(self, n: int) -> list[Row]:
        """The next ``n`` rows, transformed."""
        drawn = []
        for _ in range(n):
            (row,) = self._sampler.next(1)
            epoch = math.ceil(self._sampler.epoch) - 1
            drawn.append(self._transform(row, derive_seed(self._seed, "augment", epoch, row.problem_id)))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)
