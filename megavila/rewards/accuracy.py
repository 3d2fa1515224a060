"""Whether an answer is right, by the rule of the row's problem type."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from megavila.data.options import choice_letter
from megavila.data.row import MULTIPLE_CHOICE, OPEN_ENDED, Row
from megavila.rewards.form import extract_answer
from megavila.rewards.text_overlap import exact, f1, rouge_l
from megavila.runtime.errors import MegavilaError

_NUMBER = re.compile(
    r"([+-]?)\$?(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?(?:e([+-]?\d{1,3}))?(?:/(\d+))?%?", re.IGNORECASE
)


# Characters of a number or formula. Longer ones are not answers, and would keep the parsers busy.
_LONGEST = 1000


def accuracy(row: Row, text: str) -> float:
    """Score in [0, 1] of a response's answer against the row's key; 0 for a response without an answer.

    Multiple choice, numbers and mathematics are right or wrong; open-ended answers score by ROUGE-L. Raises
    MegavilaError for a problem type without a rule.
    """
    rule = rule_of(row)
    answer = extract_answer(text)
    return 0.0 if answer is None else rule(row, answer)


def rule_of(row: Row) -> Callable[[Row, str], float]:
    """(row, answer) -> score, by `row.problem_type`."""
    rule = _RULES.get(row.problem_type)
    if rule is None:
        raise MegavilaError(
            f"{row.source or row.problem_id}: no rule judges problem_type {row.problem_type!r}; use one of "
            f"{', '.join(map(repr, _RULES))}, or a reward function of your own with reward.accuracy_weight=0"
        )
    return rule


def _choice(row: Row, answer: str) -> float:
    allowed = [option.letter for option in row.options] or None
    letter = choice_letter(answer, allowed)
    return float(letter is not None and letter == choice_letter(row.answer))


def _numerical(row: Row, answer: str) -> float:
    key = parse_number(row.answer)
    if key is None:
        return exact(answer, row.answer)
    return float(parse_number(answer) == key)


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number: "1,234", "-0.50", "3e2", "1/2", "$5", "40%" (as 40); None for anything else."""
    if len(text) > _LONGEST:
        return None
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip().rstrip(".")
    text = re.sub(r"\s*([%/])\s*", r"\1", text)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals, exponent, denominator = match.groups()
    digits = whole.replace(",", "") + (decimals or "")
    if not any(c.isdigit() for c in digits) or (denominator is not None and int(denominator) == 0):
        return None
    value = Fraction(digits.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0) / int(denominator or 1)
    return -value if sign == "-" else value


def _math(row: Row, answer: str) -> float:
    from math_verify import parse, verify

    if len(answer) > _LONGEST:
        return 0.0
    # Its time limits are signals, which only the main thread can receive. They are there for formulas that would
    # never end, and generous, so that a busy machine does not turn right answers into wrong ones.
    limit: Any = 30 if threading.current_thread() is threading.main_thread() else None
    key = parse(f"${row.answer}$", parsing_timeout=limit)
    given = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=limit)
    return float(bool(key) and bool(verify(key, given, timeout_seconds=limit)))


_RULES: dict[str, Callable[[Row, str], float]] = {
    MULTIPLE_CHOICE: _choice,
    OPEN_ENDED: lambda row, answer: rouge_l(answer, row.answer),
    "numerical": _numerical,
    "math": _math,
    "exact": lambda row, answer: exact(answer, row.answer),
    "f1": lambda row, answer: f1(answer, row.answer),
}
