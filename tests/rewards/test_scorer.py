"""Weights and plug-ins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megavila.config import RewardConfig
from megavila.data import Row
from megavila.rewards import Score, Scorer, load_function
from megavila.runtime.errors import MegavilaError

ROW = Row("7", "Where?\nA: left\nB: right", problem_type="multiple choice", answer="B", source="rows.jsonl:3")
RIGHT = "<think>x</think> <answer>B</answer>"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "reward_functions_of_a_test"
    (tmp_path / f"{name}.py").write_text(
        "def length(row, text): return len(text) / 100\n"
        "def truth(row, text): return row.answer == 'B'\n"
        "def nothing(row, text): return None\n"
        "def infinite(row, text): return float('inf')\n"
        "def broken(row, text): return {}[row.problem_id]\n"
        "number = 3\n"
    )
    (tmp_path / f"{name}_importing.py").write_text("import no_such_library_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in (name, f"{name}_importing"):
        sys.modules.pop(module, None)
    return name


def test_default_weights() -> None:
    texts = [RIGHT, "<think>x</think> <answer>A</answer>", "<answer>B</answer>", "B"]
    scores = Scorer(RewardConfig()).score([ROW] * 4, texts)
    assert scores == [Score(1.0, 1.0, 1.0), Score(0.1, 1.0, 0.0), Score(0.9, 0.0, 1.0), Score(0.0, 0.0, 0.0)]


def test_functions_are_added(plugin: str) -> None:
    config = RewardConfig(
        accuracy_weight=0.5,
        format_weight=0.25,
        functions=(f"{plugin}:length", f"{plugin}:truth"),
        function_weights=(2.0, -0.5),
    )
    (score,) = Scorer(config).score([ROW], [RIGHT])
    assert score.functions == (len(RIGHT) / 100, 1.0)
    assert score.total == pytest.approx(0.5 + 0.25 + 2 * len(RIGHT) / 100 - 0.5)


def test_names_that_are_wrong(plugin: str) -> None:
    for name, message in (
        ("no_colon", "package.module:function"),
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        (f"{plugin}:lenght", "did you mean 'length'"),
        (f"{plugin}:number", "is a int, not a function"),
    ):
        with pytest.raises(MegavilaError, match=message):
            load_function(name)
    with pytest.raises(ModuleNotFoundError, match="no_such_library_at_all"):
        load_function(f"{plugin}_importing:f")


def test_values_that_are_wrong(plugin: str) -> None:
    for function in ("nothing", "infinite"):
        scorer = Scorer(RewardConfig(functions=(f"{plugin}:{function}",), function_weights=(1.0,)))
        with pytest.raises(MegavilaError, match=rf"{function}.*rows.jsonl:3.*finite number"):
            scorer.score([ROW], [RIGHT])


def test_an_error_inside_keeps_its_traceback_and_says_where(plugin: str) -> None:
    scorer = Scorer(RewardConfig(functions=(f"{plugin}:broken",), function_weights=(1.0,)))
    with pytest.raises(KeyError) as caught:
        scorer.score([ROW], [RIGHT])
    assert "rows.jsonl:3" in caught.value.__notes__[0]


def test_unscorable_rows_are_found_beforehand() -> None:
    riddle = Row("8", "?", problem_type="riddle", answer="x")
    with pytest.raises(MegavilaError, match="riddle"):
        Scorer(RewardConfig()).check([ROW, riddle])
    with pytest.raises(MegavilaError, match="riddle"):
        Scorer(RewardConfig()).score([riddle], [RIGHT])
    Scorer(RewardConfig(accuracy_weight=0.0)).check([riddle])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError):
        Scorer(RewardConfig()).score([ROW], [])
