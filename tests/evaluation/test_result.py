"""Scores that follow from predictions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megavila.evaluation.result import EvalResult, Prediction, load_result

RIGHT = Prediction(
    problem_id="a",
    category="Spatial",
    answer="B",
    predicted="B",
    accuracy=1.0,
    well_formed=True,
    num_frames=8,
    response="<think> x </think> <answer>B</answer>",
    num_options=3,
)
WRONG = replace(RIGHT, problem_id="b", answer="B", predicted="A", accuracy=0.0)
UNANSWERED = replace(
    RIGHT,
    problem_id="c",
    category="Temporal",
    answer="A",
    predicted=None,
    accuracy=0.0,
    well_formed=False,
    num_options=5,
)


def test_scores() -> None:
    result = EvalResult((RIGHT, WRONG, UNANSWERED), skipped=2)
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.format_rate == pytest.approx(2 / 3)
    assert result.standard_error == pytest.approx(math.sqrt(2 / 9 / 3))
    assert result.chance == pytest.approx((1 / 3 + 1 / 3 + 1 / 5) / 3)
    assert result.always_one_letter == ("B", pytest.approx(2 / 3))
    assert result.by_category() == {"Spatial": 0.5, "Temporal": 0.0}
    assert result.counts_by_category() == {"Spatial": 2, "Temporal": 1}


def test_open_questions_have_no_chance_level() -> None:
    result = EvalResult((RIGHT, replace(RIGHT, num_options=0, accuracy=0.4)))
    assert math.isnan(result.chance) and result.summary()["chance"] is None
    assert result.accuracy == pytest.approx(0.7)


def test_saved_and_read_back(tmp_path: Path) -> None:
    result = EvalResult((RIGHT, WRONG, UNANSWERED), skipped=1)
    result.save(tmp_path / "scores", "exam")
    assert load_result(tmp_path / "scores", "exam") == result
    scores = json.loads((tmp_path / "scores" / "exam.json").read_text())
    assert scores["questions"] == 3 and scores["skipped"] == 1 and scores["by_category"]["Spatial"] == 0.5
