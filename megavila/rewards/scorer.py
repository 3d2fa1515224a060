"""The total reward of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megavila.config import RewardConfig
from megavila.data.row import Row
from megavila.rewards.accuracy import accuracy, rule_of
from megavila.rewards.form import has_form
from megavila.rewards.plugins import call_function, load_function


@dataclass(frozen=True)
class Score:
    """Rewards of one response; `total` is the weighted sum of the others.

    `functions` are the values of the user's functions, in the order of `reward.functions`.
    """

    total: float
    format: float
    accuracy: float
    functions: tuple[float, ...] = ()


class Scorer:
    """Rule-based rewards (0.9 accuracy + 0.1 format by default) and the user's functions, by `RewardConfig`."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._functions = [(name, load_function(name)) for name in config.functions]

    def check(self, rows: Sequence[Row]) -> None:
        """Raise MegavilaError now for a row that could not be scored later."""
        if self._config.accuracy_weight:
            for row in rows:
                rule_of(row)

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score]:
        """One score for each response; `rows[i]` is what `texts[i]` responds to."""
        return [self._score(row, text) for row, text in zip(rows, texts, strict=True)]

    def _score(self, row: Row, text: str) -> Score:
        config = self._config
        form = float(has_form(text))
        # Without weight the rule is not applied: such rows may be judged by functions only.
        right = accuracy(row, text) if config.accuracy_weight else 0.0
        values = tuple(call_function(name, function, row, text) for name, function in self._functions)
        total = config.accuracy_weight * right + config.format_weight * form
        total += sum(weight * value for weight, value in zip(config.function_weights, values, strict=True))
        return Score(total, form, right, values)
