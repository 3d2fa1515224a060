"""One question about media, with its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megavila.data.options import Option, split_options

MULTIPLE_CHOICE = "multiple choice"
OPEN_ENDED = "open-ended"

_ANSWER = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Row:
    """A row of LongVideo-Reason's form.

    Attributes:
        problem_id: name of the row.
        problem: the question, its options inline.
        data_type: "video", "image", "text" or "audio".
        problem_type: how the answer is judged: "multiple choice", "open-ended", "numerical", "math".
        reasoning: the chain of thought for SFT; empty where there is none.
        videos: paths of the videos or images, resolved.
        answer: the key without its tags; a capital letter for multiple choice.
        category: what scores are reported by; empty where there is none.
        extra: all other columns.
        source: "file:line".
    """

    problem_id: str
    problem: str
    data_type: str = "video"
    problem_type: str = OPEN_ENDED
    reasoning: str = ""
    videos: tuple[str, ...] = ()
    answer: str = ""
    category: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def _parts(self) -> tuple[str, tuple[Option, ...]]:
        return split_options(self.problem)

    @property
    def question(self) -> str:
        """The problem without its options."""
        return self._parts[0]

    @property
    def options(self) -> tuple[Option, ...]:
        return self._parts[1]


def strip_answer_tags(answer: str) -> str:
    """The text inside <answer>…</answer>, or all of it where there are no tags."""
    match = _ANSWER.fullmatch(answer)
    return (match.group(1) if match else answer).strip()
