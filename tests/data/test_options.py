"""Options inside problems, and letters of answers."""

from __future__ import annotations

import pytest

from megavila.data.options import choice_letter, split_options


@pytest.mark.parametrize(
    ("problem", "question", "options"),
    [
        ("Which?\nA: one\nB: two", "Which?", ["one", "two"]),
        ("Which?\nA. one\nB. two\nC. three\nD. four", "Which?", ["one", "two", "three", "four"]),
        ("Which?\n(A) one\n(B) two", "Which?", ["one", "two"]),
        ("Which?\nA) one\nB) two", "Which?", ["one", "two"]),
        ("Which?\n  A: one\n  on two lines\n  B: two\n", "Which?", ["one\n  on two lines", "two"]),
        ("Which? A. one B. two C. three", "Which?", ["one", "two", "three"]),
        ("Which? (A) one (B) two", "Which?", ["one", "two"]),
        ("Person A: hello. What next?\nA: stays\nB: goes", "Person A: hello. What next?", ["stays", "goes"]),
        ("Vitamin B: good?\nOptions:\nA: yes\nB: no", "Vitamin B: good?\nOptions:", ["yes", "no"]),
        ("Which?\nA: see\nB: the plan\nB: again\nC: x", "Which?", ["see", "the plan\nB: again", "x"]),
        ("Which?\nA:\nB: two", "Which?", ["", "two"]),
        ("Q?\nA: Brutus, A. D. 79\nB: nobody", "Q?", ["Brutus, A. D. 79", "nobody"]),
    ],
)
def test_options(problem: str, question: str, options: list[str]) -> None:
    assert split_options(problem) == (question, tuple(zip("ABCDEFG", options, strict=False)))


@pytest.mark.parametrize(
    "problem", ["", "Why?", "Why A: B?", "A: only one", "B: two\nC: three", "U.S.A. B.C."]
)
def test_no_options(problem: str) -> None:
    assert split_options(problem) == (problem, ())


def test_letters() -> None:
    for text in ("C", "c", " (C) ", "C.", "C: cup", "C. cup", "(c) cup", "C)", "Ｃ"):
        assert choice_letter(text) == choice_letter(text, "ABC") == "C"
        assert choice_letter(text, "AB") is None
    for text in ("", "Cup", "C D", "C, D", "a cup", "1", "()", "<answer>C</answer>"):
        assert choice_letter(text) is None
