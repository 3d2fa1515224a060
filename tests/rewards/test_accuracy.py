"""Right and wrong answers by problem type."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from megavila.data import Row
from megavila.rewards import accuracy
from megavila.rewards.accuracy import parse_number
from megavila.rewards.text_overlap import _common_subsequence, exact, f1, rouge_l
from megavila.runtime.errors import MegavilaError

PROBLEM = "Where is the ball?\nA: left\nB: middle\nC: right"


def judged(answer: str, key: str, problem_type: str = "multiple choice", problem: str = PROBLEM) -> float:
    row = Row("1", problem, problem_type=problem_type, answer=key)
    return accuracy(row, f"<think>hm</think><answer>{answer}</answer>")


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        " B ",
        "(B)",
        "(b)",
        "B.",
        "B)",
        "B:",
        "B: middle",
        "B. middle",
        "(B) middle",
        "Ｂ",
        "B:middle",
    ],
)
def test_letters_that_are_right(answer: str) -> None:
    assert judged(answer, "B") == 1.0
    assert judged(answer, "C") == 0.0


@pytest.mark.parametrize(
    "answer",
    ["", "A", "D", "AB", "A B", "A, B", "A or B", "Both", "middle", "not B", "Bee", "B or A", "Β", "β", "2"],
)
def test_letters_that_are_wrong(answer: str) -> None:
    """Among them a Greek capital beta, which only looks like the letter."""
    assert judged(answer, "B") == 0.0


def test_answer_must_be_given_as_answer() -> None:
    row = Row("1", PROBLEM, problem_type="multiple choice", answer="B")
    for text in (
        "B",
        "<think>B</think>B",
        "<think><answer>B</answer></think>",
        "<think>B</think><answer>B",
        "",
    ):
        assert accuracy(row, text) == 0.0
    assert accuracy(row, "<answer>A</answer><answer>B</answer><answer>C</answer>") == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", Fraction(3)),
        ("3.0", Fraction(3)),
        ("3.", Fraction(3)),
        ("+3", Fraction(3)),
        ("−3", Fraction(-3)),
        (".5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("0.5", Fraction(1, 2)),
        ("-1.50", Fraction(-3, 2)),
        ("1,234,567", Fraction(1234567)),
        ("1234567", Fraction(1234567)),
        ("3e2", Fraction(300)),
        ("$5", Fraction(5)),
        ("40 %", Fraction(40)),
        ("１２", Fraction(12)),
        ("0.1", Fraction(1, 10)),
    ],
)
def test_numbers(text: str, value: Fraction) -> None:
    assert parse_number(text) == value
    assert judged(text, str(value), "numerical") == 1.0
    assert judged(text, str(value + Fraction(1, 10**9)), "numerical") == 0.0


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "%", "three", "3 4", "1,23", "1/0", "1e9999", "nan", "inf", "3 apples", "$", "9" * 5000],
)
def test_no_numbers(text: str) -> None:
    assert parse_number(text) is None
    assert judged(text, "3", "numerical") == 0.0


def test_math_by_value() -> None:
    for answer in (r"\frac{1}{2}", "0.5", r"$\frac{2}{4}$", r"\boxed{1/2}"):
        assert judged(answer, r"\frac{1}{2}", "math") == 1.0, answer
    for answer in ("2", "", r"\frac{1}{", "9" * 5000):
        assert judged(answer, r"\frac{1}{2}", "math") == 0.0, answer
    assert judged("x^2+2x+1", "(x+1)^2", "math") == 1.0


def test_open_ended_overlap() -> None:
    assert judged("The red cup!", "the red cup", "open-ended") == 1.0
    assert judged("cup red", "the red cup", "open-ended") == pytest.approx(2 * 1 / 5)
    assert judged("cup red", "the red cup", "f1") == pytest.approx(2 * 2 / 5)
    assert judged("cup red", "the red cup", "exact") == 0.0
    assert judged("", "the red cup", "open-ended") == 0.0
    assert exact("", "") == f1("", "") == rouge_l("", "") == 0.0
    assert rouge_l("赤いカップ", "青いカップ") == pytest.approx(0.8)


def test_common_subsequence_is_the_textbook_one() -> None:
    def reference(a: list[str], b: list[str]) -> int:
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(90))] for _ in range(2))
        assert _common_subsequence(a, b) == reference(a, b)


def test_long_open_ended_answers_are_quick() -> None:
    assert 0 < judged("the cup " * 50_000, "the red cup " * 300, "open-ended") < 0.05


def test_unknown_type_is_named() -> None:
    with pytest.raises(MegavilaError, match="'riddle'.*'multiple choice'"):
        judged("B", "B", "riddle")
