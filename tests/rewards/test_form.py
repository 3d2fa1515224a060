"""The form of a response and the extraction of its answer, against the regular expression that defines it."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from megavila.rewards import extract_answer, has_form

DEFINITION = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def test_form_equals_its_definition_on_every_short_text() -> None:
    pieces = ("<think>", "</think>", "<answer>", "</answer>", " ", "x")
    matched = 0
    for length in range(7):
        for choice in itertools.product(pieces, repeat=length):
            text = "".join(choice)
            assert has_form(text) == bool(DEFINITION.fullmatch(text.strip())), text
            matched += has_form(text)
    assert matched > 100


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        ("<think> a\nb </think>\n<answer> B </answer>", True, "B"),
        ("  <think></think><answer></answer>\n", True, ""),
        ("", False, None),
        ("B", False, None),
        ("the answer is B", False, None),
        ("<answer>B</answer>", False, "B"),
        ("<think>x</think> so <answer>B</answer>", False, "B"),
        ("<think>x</think><answer>B</answer> and so on", False, "B"),
        ("<think>x</think><answer>B", False, None),
        ("<think>x<answer>B</answer>", False, None),
        ("<think>is it <answer>B</answer>?</think>", False, None),
        ("<think>is it <answer>B</answer>?</think><answer>C</answer>", True, "C"),
        ("<think>x</think><answer>A</answer><answer>B</answer>", True, "B"),
        ("<think>x</think><answer>A</answer> <answer>B", False, "A"),
        ("<think>x</think><answer>A<answer>B</answer></answer>", True, "B"),
        ("<think>x</think><answer>B</answer><think>y", False, None),
        ("<think>x</think><answer>B</answer></think>", False, None),
        ("<think>x</think><answer>B</answer><think>no</think><answer>C</answer>", True, "C"),
        ("<THINK>x</THINK><ANSWER>B</ANSWER>", False, None),
        ("<think>x</think><answer >B</answer>", False, None),
        ("<think>数える</think>\u3000<answer>Ｂ</answer>", True, "Ｂ"),
        ("<think>\0</think><answer>é\u0301</answer>", True, "é\u0301"),
    ],
)
def test_texts(text: str, form: bool, answer: str | None) -> None:
    assert has_form(text) == form == bool(DEFINITION.fullmatch(text.strip()))
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "unit", ["<think>", "</think>", "</think> <answer>", "<answer>", "<answer>x", "</answer>", " ", "<", "x"]
)
def test_long_texts_take_linear_time(unit: str) -> None:
    text = "<think>" + unit * (3_000_000 // len(unit))
    begin = time.process_time()
    has_form(text), has_form(text + "</answer>"), extract_answer(text), extract_answer(text + "</answer>")
    assert time.process_time() - begin < 5


def test_long_thought() -> None:
    text = "<think>" + "step " * 500_000 + "</think><answer>C</answer>"
    assert has_form(text) and extract_answer(text) == "C"
