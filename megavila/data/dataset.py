"""The order in which rows are visited, and prompts made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from megavila.data.prompt import Prompt, PromptBuilder
from megavila.data.row import Row
from megavila.media import MediaError
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger
from megavila.runtime.seeds import derive_seed

_log = get_logger(__name__)


class GroupSampler:
    """Endless epochs over rows, each in an order of its own that depends on the seed and nothing else.

    Every rank draws the same rows and takes its share of them, so the order does not depend on how many ranks there
    are, and a run resumes exactly where it was.
    """

    def __init__(self, rows: Sequence[Row], seed: int, *, shuffle: bool = True) -> None:
        if not rows:
            raise MegavilaError("there are no rows to draw from; check data.train and data.on_bad_row")
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def epoch(self) -> float:
        """Epochs drawn so far, with the fraction of the current one."""
        return self._epoch + self._position / len(self._rows)

    def next(self, n: int) -> list[Row]:
        """The next `n` rows; they may run over the end of an epoch."""
        drawn: list[Row] = []
        while len(drawn) < n:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
            take = self._order[self._position : self._position + n - len(drawn)]
            self._position += len(take)
            drawn += [self._rows[i] for i in take]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "rows": self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises MegavilaError when it belongs to other rows or another seed."""
        for key, mine, what in (
            ("rows", self._identity(), "the rows (data.train)"),
            ("seed", self._seed, "the seed"),
        ):
            if state[key] != mine:
                raise MegavilaError(
                    f"cannot resume: {what} changed from {state[key]} to {mine}; go back, or start a new run"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._permutation(self._epoch)

    def _permutation(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._rows)))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "epoch", epoch))
        return torch.randperm(len(self._rows), generator=generator).tolist()

    def _identity(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for row in self._rows:
            digest.update(repr((row.problem_id, row.problem, row.answer)).encode())
        return f"{len(self._rows)} rows, {digest.hexdigest()}"


class PromptStream:
    """Prompts of a sampler's rows; rows whose media cannot be read are skipped and counted where that is allowed.

    Skipped rows are made up for by the next ones, on every rank alike.
    """

    def __init__(self, sampler: GroupSampler, builder: PromptBuilder) -> None:
        self.sampler = sampler
        self.builder = builder
        self.failed = 0

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts. Raises MediaError, unless `data.on_bad_media` is "skip"."""
        prompts: list[Prompt] = []
        in_vain = 0
        while len(prompts) < n:
            row = self.sampler.next(1)[0]
            try:
                prompts.append(self.builder.build(row))
                in_vain = 0
            except MediaError as error:
                if self.builder.config.on_bad_media == "error":
                    raise
                self.failed += 1
                in_vain += 1
                _log.warning("skipped %s: %s", row.source or row.problem_id, error)
                if in_vain == self.sampler.num_rows:
                    raise MegavilaError(f"no media of any of {in_vain} rows in turn can be read") from error
        return prompts

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict(), "failed": self.failed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.failed = state["failed"]
