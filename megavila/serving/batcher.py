"""Requests that wait are answered together, by the one thread that may touch the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from megavila.runtime.logging import get_logger
from megavila.serving.errors import ApiError

T = TypeVar("T")
R = TypeVar("R")

_log = get_logger(__name__)


class Batcher(Generic[T, R]):
    """A queue in front of a function that answers several requests at once.

    A batch is the request that has waited longest and those behind it that are like it, in their order. While it
    is answered others gather; nobody waits for a batch to fill.

    Args:
        answer: called on the batcher's own thread, one batch at a time, with requests that `like` finds equal; one
            result or exception for each.
        like: what must be equal for requests to be answered together.
        max_batch: most requests in a batch.
        max_waiting: most requests in the queue.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[T]], Sequence[R | Exception]],
        like: Callable[[T], Hashable],
        *,
        max_batch: int,
        max_waiting: int,
    ) -> None:
        self._answer, self._like = answer, like
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._waiting: deque[tuple[T, Future[R]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.batches = 0
        """How many were answered or are being so."""
        self._thread = threading.Thread(target=self._run, name="megavila-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._closed and self._thread.is_alive()

    def submit(self, request: T) -> Future[R]:
        """The result to come. Cancelling it takes the request out of the queue.

        Raises:
            ApiError: 503, the queue is full or the server is closing.
        """
        with self._changed:
            if not self.alive:
                raise _closing()
            if len(self._waiting) >= self._max_waiting:
                raise ApiError(
                    503,
                    f"{len(self._waiting)} requests wait already, max_waiting is {self._max_waiting}; try again later",
                    code="overloaded",
                )
            future: Future[R] = Future()
            self._waiting.append((request, future))
            self._changed.notify()
            return future

    def close(self) -> None:
        """Answer the batch that is being answered, turn those that wait away, end the thread."""
        with self._changed:
            self._closed = True
            left = [future for _, future in self._waiting if future.set_running_or_notify_cancel()]
            self._waiting.clear()
            self._changed.notify()
        for future in left:
            future.set_exception(_closing())
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take():
            self.batches += 1
            try:
                results = self._answer([request for request, _ in batch])
                if len(results) != len(batch):
                    raise AssertionError(f"{len(results)} results for {len(batch)} requests")
            except Exception as error:  # this batch is lost, the thread and the queue are not
                _log.exception("a batch of %d requests failed", len(batch))
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _take(self) -> list[tuple[T, Future[R]]]:
        """The next batch; empty when the batcher is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return []
                kind = self._like(self._waiting[0][0])
                batch: list[tuple[T, Future[R]]] = []
                others: deque[tuple[T, Future[R]]] = deque()
                for item in self._waiting:
                    if len(batch) < self._max_batch and self._like(item[0]) == kind:
                        if item[1].set_running_or_notify_cancel():
                            batch.append(item)
                    else:
                        others.append(item)
                self._waiting = others
                if batch:
                    return batch


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="closing")
