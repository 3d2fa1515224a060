"""Multiple-choice options written inside a question, and the letter of an answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

# "A: text", "A. text", "A) text", "(A) text". The mark must be followed by a blank: "A.D. 79" is no option.
_MARK = r"(?:\((?P<p>[A-Z])\)[.:]?|(?P<m>[A-Z])[.:)])(?=\s|$)"
_LINE_MARK = re.compile(r"^[ \t]*" + _MARK, re.MULTILINE)
_INLINE_MARK = re.compile(r"(?:(?<=\s)|^)" + _MARK)
_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LED = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s?\s*\S.*", re.DOTALL)


class Option(NamedTuple):
    letter: str
    text: str


def split_options(problem: str) -> tuple[str, tuple[Option, ...]]:
    """Split a problem into its question and its options, lettered A, B, … in order.

    Options stand on lines of their own or, where none do, one after another in a line. The last such list counts. A
    problem without at least two options is all question.
    """
    for mark in (_LINE_MARK, _INLINE_MARK):
        matches = list(mark.finditer(problem))
        chain = _last_chain(matches)
        if chain:
            ends = [match.start() for match in chain[1:]] + [len(problem)]
            options = tuple(
                Option(_letter(match), problem[match.end() : end].strip())
                for match, end in zip(chain, ends, strict=True)
            )
            return problem[: chain[0].start()].rstrip(), options
    return problem, ()


def _letter(match: re.Match[str]) -> str:
    return match.group("p") or match.group("m")


def _last_chain(matches: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last run of marks A, B, C, … of at least two; marks out of turn are text of an option."""
    for start in reversed([i for i, match in enumerate(matches) if _letter(match) == "A"]):
        chain = [matches[start]]
        for match in matches[start + 1 :]:
            if _letter(match) == chr(ord("A") + len(chain)):
                chain.append(match)
        if len(chain) >= 2:
            return chain
    return []


def choice_letter(text: str, allowed: Iterable[str] | None = None) -> str | None:
    """The letter that an answer names: "B", "b", "(B)", "B.", "B: foo", "(B) foo"; None for anything else.

    Compatibility forms (full-width letters) count as plain ones. With `allowed`, a letter outside it is None. Words
    that only start with a letter ("Both", "a cat") name none.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    match = _ALONE.fullmatch(text) or _LED.fullmatch(text)
    if match is None:
        return None
    letter = next(group for group in match.groups() if group).upper()
    return letter if allowed is None or letter in set(allowed) else None
