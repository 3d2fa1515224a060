"""Sampling on when an engine fails: what is done stays done, the rest is tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from megavila.rollout.protocol import RolloutError
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger

T = TypeVar("T")

_log = get_logger(__name__)


class EngineFailed(RolloutError):
    """An engine died or stood still, and trying again did not help."""


class EngineGone(EngineFailed):
    """It generates no more, whatever it is asked."""


def sample_all(
    names: Sequence[str],
    sample: Callable[[Sequence[int]], Iterator[tuple[int, T]]],
    recover: Callable[[], None],
    *,
    retries: int,
) -> list[T]:
    """One result for each name, in order, from an engine that may fail on the way.

    Args:
        names: what to call the prompts in messages.
        sample: yields (index, result) for each of the indices it is given, in any order; may raise at any time.
        recover: called after each failure; makes the engine fit for another `sample`, or raises EngineFailed.
        retries: how often what is left is tried again. The last time one by one: a prompt that an engine dies of
            then takes no other with it, and is known.

    Raises:
        EngineFailed: prompts are left after the last try; the message names them. The engine has recovered.
        MegavilaError: as `sample` raises it. It is about the input, which is as wrong at another try.
    """
    done: dict[int, T] = {}
    reason = ""
    for attempt in range(retries + 1):
        left = [index for index in range(len(names)) if index not in done]
        alone = attempt == retries > 0
        for part in [[index] for index in left] if alone else [left] if left else []:
            failure = _sample_part(part, sample, done)
            if failure is None:
                continue
            reason = failure
            _log.warning(
                "the rollout engine failed at try %d of %d, with %d of %d prompts done: %s",
                attempt + 1,
                retries + 1,
                len(done),
                len(names),
                failure,
            )
            recover()
    if left := [index for index in range(len(names)) if index not in done]:
        shown = ", ".join(names[index] for index in left[:5]) + (", …" if len(left) > 5 else "")
        raise EngineFailed(
            f"the rollout engine failed {retries + 1} times on {len(left)} of {len(names)} prompts ({shown}): {reason}"
        )
    return [done[index] for index in range(len(names))]


def _sample_part(
    part: Sequence[int], sample: Callable[[Sequence[int]], Iterator[tuple[int, T]]], done: dict[int, T]
) -> str | None:
    """Adds to ``done``; what went wrong, or None. As text: the exception would keep a dead engine's memory."""
    try:
        for index, result in sample(part):
            done[index] = result
    except MegavilaError:
        raise
    except Exception as error:
        _log.debug("failure of the rollout engine", exc_info=True)
        return f"{type(error).__name__}: {error}"
    missing = sum(index not in done for index in part)
    return f"{missing} prompts got no responses" if missing else None
