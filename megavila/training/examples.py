"""This rank's share of a step: prompts, with their videos encoded."""

from dataclasses import dataclass

from megavila.data.prompt import Prompt
from megavila.media import MediaError
from megavila.mrsp.shards import ShardedRows
from megavila.runtime.logging import get_logger
from megavila.training.agreement import together
from megavila.training.session import Session
from megavila.training.tally import Tally

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt of this rank.

    Attributes:
        index: its place among the step's prompts of all data-parallel ranks.
        media_rows: without gradient, each rank of the replica with those that it encoded; None for a prompt
            without media, and where only passes with gradient will encode it.
    """

    index: int
    prompt: Prompt
    media_rows: ShardedRows | None


def draw_examples(session: Session, count: int, tally: Tally, *, encode: bool = True) -> list[Example]:
    """Draw the step's ``count`` prompts and encode those of this rank (or, without ``encode``, decode them).

    Every rank draws the same prompts and takes every data-parallel-degree-th of them. A video that turns out
    to be damaged only when it is decoded is an error or, with data.on_bad_media=skip, leaves the step one
    prompt short.
    """
    before = session.prompts.failed
    examples = together(
        lambda: _encode(session, session.prompts.next(count), tally, encode), session.topology
    )
    if session.topology.data_rank == 0:
        tally.total("media/failed", session.prompts.failed - before)
    session.state.rows += count
    return examples


def _encode(session: Session, prompts: list[Prompt], tally: Tally, encode: bool) -> list[Example]:
    own = range(session.topology.data_rank, len(prompts), session.topology.data)
    look = session.encoder.rows if encode else session.encoder.decode
    examples = []
    tally.total("media/failed", 0)
    tally.total("media/videos", 0)
    for index, rows in zip(own, look([prompts[index] for index in own]), strict=True):
        prompt = prompts[index]
        if isinstance(rows, MediaError):
            tally.total("media/failed", 1)
            logger.warning("skipped %s: %s", prompt.row.source or prompt.row.problem_id, rows)
            continue
        examples.append(Example(index, prompt, rows))
        tally.total("media/videos", len(prompt.videos))
    return examples
