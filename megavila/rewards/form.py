"""The form of a response, and the answer it gives.

A response of the right form is `<think> … </think> <answer> … </answer>`, from its first character to its last.
"""

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</answer>"
_SEAM = re.compile(r"</think>\s*<answer>")
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def has_form(text: str) -> bool:
    """Whether the whole text, blanks at its ends aside, matches `<think>.*?</think>\\s*<answer>.*?</answer>`.

    Dots match line ends too. Written out, since the pattern takes quadratic time on texts made of many tags: if any
    seam between thought and answer lies within the frame of the first and last tag, the first one does.
    """
    text = text.strip()
    if not (text.startswith(_OPEN) and text.endswith(_CLOSE)):
        return False
    seam = _SEAM.search(text, len(_OPEN))
    return seam is not None and seam.end() <= len(text) - len(_CLOSE)


def extract_answer(text: str) -> str | None:
    """The answer a response gives, or None. It counts only in answer tags, and never as part of the thought.

    - A thought that is opened and not closed has no answer after it; what precedes the last `</think>` is thought.
    - Of several answers the last one counts, so that listing all options wins nothing.
    - In nested tags the innermost pair counts. An empty answer is "".
    """
    thought_end = text.rfind("</think>")
    if text.rfind("<think>") > thought_end:
        return None
    answers = _ANSWER.findall(text, thought_end + 1)
    return answers[-1].strip() if answers else None
