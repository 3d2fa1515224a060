"""Numbers of one step, added up over micro-batches and over data-parallel ranks."""

from collections.abc import Mapping

from megavila.runtime.collectives import gather_objects
from megavila.runtime.topology import Topology


class Tally:
    """Collects totals, means and maxima by name; `reduce` turns them into the step's metrics.

    Ranks need not know the same names: one without a group of its own still takes part.
    """

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._weighted: dict[str, tuple[float, float]] = {}
        self._maxima: dict[str, float] = {}

    def total(self, name: str, value: float) -> None:
        """Add ``value`` to a sum that is reported as such."""
        self._totals[name] = self._totals.get(name, 0) + value

    def mean(self, name: str, value_sum: float, count: float) -> None:
        """Add the sum of ``count`` values to a mean over all of them."""
        old_sum, old_count = self._weighted.get(name, (0.0, 0.0))
        self._weighted[name] = (old_sum + float(value_sum), old_count + float(count))

    def maximum(self, name: str, value: float) -> None:
        """Take ``value`` into a maximum."""
        self._maxima[name] = max(self._maxima.get(name, float(value)), float(value))

    def reduce(self, topology: Topology) -> dict[str, float]:
        """Return the metrics over all data-parallel ranks, the same on every rank. A mean of nothing is 0."""
        joined = Tally()
        for totals, weighted, maxima in gather_objects(
            (self._totals, self._weighted, self._maxima), topology.data_group
        ):
            for name, value in totals.items():
                joined.total(name, value)
            for name, (value_sum, count) in weighted.items():
                joined.mean(name, value_sum, count)
            for name, value in maxima.items():
                joined.maximum(name, value)
        means = {name: s / n if n else 0.0 for name, (s, n) in joined._weighted.items()}
        return {**joined._totals, **means, **joined._maxima}


def sum_over_data(values: Mapping[str, int], topology: Topology) -> dict[str, int]:
    """Return the sums of integer counts over data-parallel ranks, which must name the same ones."""
    parts = gather_objects(dict(values), topology.data_group)
    return {name: sum(part[name] for part in parts) for name in values}
