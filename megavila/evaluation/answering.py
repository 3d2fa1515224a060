"""Answers to rows, in batches: what evaluation and offline generation are made of."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from megavila.config import EvalConfig
from megavila.data import Prompt, Row, read_rows
from megavila.evaluation.responder import Responder, open_responder
from megavila.media import FrameCache, MediaError
from megavila.rollout.protocol import Response, SamplingParams
from megavila.runtime.logging import get_logger
from megavila.runtime.seeds import derive_seed

_log = get_logger(__name__)


@dataclass(frozen=True)
class Answered:
    """A prompt and the model's responses to it."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class Answerer(Responder):
    """A model that is ready to answer rows; `open_answerer` builds one."""

    config: EvalConfig

    def rows(self) -> list[Row]:
        """All rows of `data.eval`, or the first `limit` of them."""
        rows = [row for path in self.config.data.eval for row in read_rows(path, self.config.data).rows]
        return rows[: self.config.limit]

    def answer(
        self, rows: Sequence[Row], *, num_frames: int | None = None, blank: bool = False, responses: int = 1
    ) -> Iterator[list[Answered | None]]:
        """Responses to rows, a batch at a time and in order; None for a row whose media were skipped by policy.

        Args:
            num_frames: frames sampled from each video, whatever the rows or `data` say; None: as they say.
            blank: show black frames in place of the video's, with the same times and tokens.
            responses: for each row; more than one needs a temperature above 0 to differ.

        Raises MediaError for unreadable media, unless `data.on_bad_media` is "skip".
        """
        builder = self.prompt_builder(self.context_tokens - self.config.max_response_tokens, num_frames)
        params = SamplingParams(
            max_tokens=self.config.max_response_tokens,
            temperature=self.config.temperature,
            group_size=responses,
        )
        for first in range(0, len(rows), self.config.batch_size):
            batch = rows[first : first + self.config.batch_size]
            ready: dict[int, tuple[Prompt, Tensor | None]] = {}
            for place, row in enumerate(batch):
                try:
                    prompt = builder.build(_with_frames(row, num_frames))
                    ready[place] = prompt, self.media_rows(prompt, blank=blank)
                except MediaError as error:
                    if self.config.data.on_bad_media == "error":
                        raise
                    _log.warning("skipped %s: %s", row.source or row.problem_id, error)
            if not ready:
                yield [None] * len(batch)
                continue
            groups = self.engine.generate(
                [prompt for prompt, _ in ready.values()],
                [media for _, media in ready.values()],
                params,
                [derive_seed(self.config.seed, "answer", batch[place].problem_id) for place in ready],
            )
            found = {
                place: Answered(ready[place][0], group) for place, group in zip(ready, groups, strict=True)
            }
            yield [found.get(place) for place in range(len(batch))]


@contextmanager
def open_answerer(config: EvalConfig, *, frames: FrameCache | None = None) -> Iterator[Answerer]:
    """Join the processes, load the model and yield what answers rows; leave the process groups at the end.

    frames: decoded frames to go on from, where several models in one process look at the same videos.
    """
    with open_responder(config, frames=frames) as opened:
        yield Answerer(config, opened.topology, opened.tokenizer, opened.model, opened.engine, opened.encoder)


def _with_frames(row: Row, num_frames: int | None) -> Row:
    """`row` without a frame sampling of its own where the caller sets one."""
    if num_frames is None:
        return row
    own = {key: value for key, value in row.extra.items() if key not in ("num_frames", "fps", "max_frames")}
    return replace(row, extra=own)
