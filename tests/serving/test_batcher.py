"""The queue in front of the model: what is answered together, in which order, and what happens when it fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from megavila.serving.batcher import Batcher
from megavila.serving.errors import ApiError

SECONDS = 20


class Held:
    """Answers `(kind, number)` by its number; each batch waits until it is let go. Numbers below 0 fail alone."""

    def __init__(self, max_batch: int = 3, max_waiting: int = 100) -> None:
        self.batches: list[list[tuple[str, int]]] = []
        self.started, self.let_go = threading.Semaphore(0), threading.Semaphore(0)
        self.batcher = Batcher[Any, int](
            self.answer, lambda request: request[0], max_batch=max_batch, max_waiting=max_waiting
        )

    def answer(self, batch: Sequence[tuple[str, int]]) -> list[int | Exception]:
        self.batches.append(list(batch))
        self.started.release()
        assert self.let_go.acquire(timeout=SECONDS)
        if any(kind == "broken" for kind, _ in batch):
            raise ZeroDivisionError("the model fell over")
        return [number if number >= 0 else ValueError(f"bad {number}") for _, number in batch]

    def hold_first(self) -> Future[int]:
        """A request that is being answered until it is let go, so that others gather behind it."""
        first = self.batcher.submit(("first", 0))
        assert self.started.acquire(timeout=SECONDS)
        return first

    def finish(self) -> None:
        self.let_go.release(100)
        self.batcher.close()


def test_requests_that_wait_are_answered_together() -> None:
    held = Held()
    first = held.hold_first()
    asked = [("a", 1), ("b", 2), ("a", 3), ("b", -4), ("a", 5), ("a", 6)]
    futures = [held.batcher.submit(request) for request in asked]
    assert held.batcher.waiting == 6 and not futures[0].done()
    held.let_go.release(100)
    assert first.result(SECONDS) == 0
    results = [future.exception(SECONDS) or future.result() for future in futures]
    assert [str(r) if isinstance(r, Exception) else r for r in results] == [1, 2, 3, "bad -4", 5, 6]
    # The one that waited longest leads; like ones join it, three at most, and the others keep their order.
    assert held.batches[1:] == [[("a", 1), ("a", 3), ("a", 5)], [("b", 2), ("b", -4)], [("a", 6)]]
    assert held.batcher.batches == 4 and held.batcher.waiting == 0
    held.finish()


def test_a_failed_batch_leaves_the_queue_alive() -> None:
    held = Held()
    held.let_go.release(100)
    with pytest.raises(ZeroDivisionError, match="fell over"):
        held.batcher.submit(("broken", 1)).result(SECONDS)
    assert held.batcher.submit(("a", 7)).result(SECONDS) == 7
    held.finish()


def test_a_full_queue_turns_requests_away() -> None:
    held = Held(max_waiting=2)
    held.hold_first()
    kept = [held.batcher.submit(("a", number)) for number in (1, 2)]
    with pytest.raises(ApiError, match="2 requests wait already, max_waiting is 2") as caught:
        held.batcher.submit(("a", 3))
    assert caught.value.status == 503
    held.let_go.release(100)
    assert [future.result(SECONDS) for future in kept] == [1, 2]
    held.finish()


def test_a_cancelled_request_is_not_answered() -> None:
    held = Held()
    held.hold_first()
    gone, kept = (held.batcher.submit(("a", number)) for number in (1, 2))
    assert gone.cancel()
    held.let_go.release(100)
    assert kept.result(SECONDS) == 2 and held.batches[1:] == [[("a", 2)]]
    with pytest.raises(CancelledError):
        gone.result(SECONDS)
    held.finish()


def test_closing_finishes_what_runs_and_turns_the_rest_away() -> None:
    held = Held()
    first = held.hold_first()
    waiting = held.batcher.submit(("a", 1))
    closer = threading.Thread(target=held.batcher.close)
    closer.start()
    with pytest.raises(ApiError, match="shutting down"):
        waiting.result(SECONDS)
    assert closer.is_alive() and not first.done()
    held.let_go.release()
    closer.join(SECONDS)
    assert first.result(SECONDS) == 0 and not held.batcher.alive
    with pytest.raises(ApiError, match="shutting down"):
        held.batcher.submit(("a", 2))
