"""When a response ends, and the text it then has."""

from __future__ import annotations

from collections.abc import Sequence

from megavila.data.tokenizer import Tokenizer


class StopChecker:
    """Finds stop strings in what responses decode to, without decoding every response at every step.

    A stop string can only be completed by a token that brings its last character (or a piece of it). Whether
    a token can is found out once per token, so most steps cost a dictionary look-up per response.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._last = {text[-1] for text in stop}
        self._may_complete: dict[int, bool] = {}

    def completes(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of these tokens makes the decoded text contain a stop string."""
        return (
            bool(self._stop)
            and self._can_complete(token_ids[-1])
            and self._end(self._decode(token_ids)) is not None
        )

    def text(self, token_ids: Sequence[int]) -> str:
        """The response's text: no end-of-sequence token, nothing after the first stop string."""
        text = self._decode(token_ids)
        return text[: self._end(text)]

    def _decode(self, token_ids: Sequence[int]) -> str:
        if token_ids and token_ids[-1] == self._tokenizer.eos_id:
            token_ids = token_ids[:-1]
        return self._tokenizer.decode(list(token_ids))

    def _end(self, text: str) -> int | None:
        """Where the stop string that ends first ends, or None."""
        ends = [found + len(stop) for stop in self._stop if (found := text.find(stop)) >= 0]
        return min(ends, default=None)

    def _can_complete(self, token_id: int) -> bool:
        known = self._may_complete.get(token_id)
        if known is None:
            # Twice: at the start of a text a tokenizer may drop a space that the token has elsewhere.
            text = self._tokenizer.decode([token_id, token_id])
            # The replacement character stands for bytes that are part of a character.
            known = any(character in self._last for character in text) or "\ufffd" in text
            self._may_complete[token_id] = known
        return known
