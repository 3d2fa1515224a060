"""What an evaluation found: one prediction a row, and the scores that follow from them."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prediction:
    """The model's response to one row, and how it was scored.

    `predicted` is the extracted answer, None when the response holds no well-formed answer: such a row counts as wrong,
    never as missing. `accuracy` is 0 or 1 except for open-ended answers, which score in between.
    """

    problem_id: str
    category: str
    answer: str
    predicted: str | None
    accuracy: float
    well_formed: bool
    num_frames: int
    response: str
    num_options: int


@dataclass(frozen=True)
class EvalResult:
    """Predictions over a set of rows.

    `skipped` counts rows whose media could not be read under `on_bad_media=skip`; they are in no score.
    """

    predictions: tuple[Prediction, ...]
    skipped: int = 0

    @property
    def accuracy(self) -> float:
        return _mean(p.accuracy for p in self.predictions)

    @property
    def format_rate(self) -> float:
        return _mean(p.well_formed for p in self.predictions)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as a binomial proportion."""
        n = len(self.predictions)
        return math.sqrt(self.accuracy * (1 - self.accuracy) / n) if n else math.nan

    @property
    def chance(self) -> float:
        """Expected accuracy of a uniform guess over each row's own options; nan for a set with open questions."""
        if any(p.num_options < 1 for p in self.predictions):
            return math.nan
        return _mean(1 / p.num_options for p in self.predictions)

    @property
    def always_one_letter(self) -> tuple[str, float]:
        """The most frequent key and the accuracy of always answering it: a skewed key makes this a real baseline."""
        counts = Counter(p.answer for p in self.predictions)
        letter, count = counts.most_common(1)[0]
        return letter, count / len(self.predictions)

    def by_category(self) -> dict[str, float]:
        groups: dict[str, list[float]] = defaultdict(list)
        for prediction in self.predictions:
            groups[prediction.category].append(prediction.accuracy)
        return {name: _mean(groups[name]) for name in sorted(groups)}

    def counts_by_category(self) -> dict[str, int]:
        return dict(sorted(Counter(p.category for p in self.predictions).items()))

    def summary(self) -> dict[str, object]:
        """The scores as plain numbers, for JSON."""
        letter, share = self.always_one_letter
        return {
            "questions": len(self.predictions),
            "skipped": self.skipped,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "format": self.format_rate,
            "chance": None if math.isnan(self.chance) else self.chance,
            "always_one_letter": {"letter": letter, "accuracy": share},
            "by_category": self.by_category(),
        }

    def save(self, directory: Path, name: str) -> None:
        """Write `<name>.json` (scores) and `<name>.predictions.jsonl` (every response) into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"{name}.predictions.jsonl").open("w") as out:
            for prediction in self.predictions:
                out.write(json.dumps(asdict(prediction)) + "\n")
        # Scores last: where they are, the predictions are whole.
        (directory / f"{name}.json").write_text(json.dumps(self.summary(), indent=2) + "\n")


def load_result(directory: Path, name: str) -> EvalResult:
    """Read back what `EvalResult.save` wrote."""
    with (directory / f"{name}.predictions.jsonl").open() as lines:
        predictions = tuple(Prediction(**json.loads(line)) for line in lines)
    return EvalResult(predictions, json.loads((directory / f"{name}.json").read_text())["skipped"])


def _mean(values: Iterable[float]) -> float:
    numbers = [float(v) for v in values]
    return sum(numbers) / len(numbers) if numbers else math.nan
