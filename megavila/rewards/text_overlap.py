"""How alike two texts are, by their words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Scripts written without blanks count by character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def words(text: str) -> list[str]:
    """Words in compatibility form and without case; punctuation is left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def exact(text: str, key: str) -> float:
    """1.0 when both have the same words in the same order, else 0.0."""
    return float(words(text) == words(key) and bool(words(key)))


def f1(text: str, key: str) -> float:
    """Harmonic mean of precision and recall of words, counting repeats (SQuAD's F1, articles kept)."""
    mine, theirs = words(text), words(key)
    return _f_measure((Counter(mine) & Counter(theirs)).total(), len(mine), len(theirs))


def rouge_l(text: str, key: str) -> float:
    """ROUGE-L F-measure (Lin, 2004; equal weights): as F1, on the longest common subsequence of words."""
    mine, theirs = words(text), words(key)
    return _f_measure(_common_subsequence(mine, theirs), len(mine), len(theirs))


def _f_measure(common: int, mine: int, theirs: int) -> float:
    return 2 * common / (mine + theirs) if common else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by Hyyrö's bit-parallel recurrence (2004).

    One bit for each word of `second`; a bit that has become 0 marks a step of the subsequence. A response of a
    hundred thousand words costs a hundred thousand additions.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(second):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(second)) - 1
    row = full
    for word in first:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return (full & ~row).bit_count()
