"""What SFT teaches a model to write."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megavila.data.row import Row
from megavila.runtime.errors import MegavilaError

ReasoningHook = Callable[[Row, Sequence[float]], str | None]
"""(row, timestamps of the frames shown) -> the reasoning that these frames support, None when they cannot."""

_TAGGED = re.compile(r"<think>.*?</think>\s*(<answer>.*</answer>)?", re.DOTALL)


def target_text(
    row: Row,
    timestamps: Sequence[float] = (),
    *,
    rewrite: ReasoningHook | None = None,
    think: bool = True,
) -> str | None:
    """`<think> reasoning </think> <answer>key</answer>` for a row.

    Reasoning that carries its own tags is kept as it is, and completed with the answer where it has none. `rewrite`
    supplies the reasoning for the frames shown; its None, "these frames do not tell", is passed on. Without `think`
    the thought is empty, so that the form stays. Raises MegavilaError for a row without reasoning.
    """
    answer = f"<answer>{row.answer}</answer>"
    if not think:
        return f"<think> </think> {answer}"
    reasoning = rewrite(row, timestamps) if rewrite else row.reasoning
    if reasoning is None:
        return None
    reasoning = reasoning.strip()
    if not reasoning:
        raise MegavilaError(f"{row.source or row.problem_id}: has no reasoning to be trained on")
    tagged = _TAGGED.fullmatch(reasoning)
    if tagged is None:
        return f"<think> {reasoning} </think> {answer}"
    return reasoning if tagged.group(1) else f"{reasoning} {answer}"
