"""Ranks as threads of one process: attention strategies over any degree without starting processes."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TIMEOUT_SECONDS = 120.0


@dataclass
class Arrival:
    mailbox: "queue.Queue[Tensor]"
    receive: Tensor

    def wait(self) -> None:
        sent = self.mailbox.get(timeout=TIMEOUT_SECONDS)
        assert sent.shape == self.receive.shape and sent.dtype == self.receive.dtype
        assert self.receive.is_contiguous()
        self.receive.copy_(sent)


@dataclass
class Wire:
    """What the ranks of one group share."""

    size: int
    mailboxes: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)
    table: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.mailboxes = [queue.Queue() for _ in range(self.size)]
        self.barrier = threading.Barrier(self.size, timeout=TIMEOUT_SECONDS)
        self.table = [None] * self.size


@dataclass
class ThreadGroup:
    """`Neighbours` and `Exchange` of one thread."""

    wire: Wire
    rank: int
    sent: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.wire.size

    def shift(self, send: Tensor, receive: Tensor) -> Sequence[Arrival]:
        assert send.is_contiguous()
        self.sent.append(send.clone())
        self.wire.mailboxes[(self.rank + 1) % self.size].put(self.sent[-1])
        return [Arrival(self.wire.mailboxes[self.rank], receive)]

    def all_to_all(self, send: Tensor) -> Tensor:
        assert send.is_contiguous() and len(send) == self.size
        self.sent.append(send.clone())
        self.wire.table[self.rank] = self.sent[-1]
        self.wire.barrier.wait()
        received = torch.stack([part[self.rank] for part in self.wire.table])
        self.wire.barrier.wait()
        return received


def run_threads(fn: Callable[[int], Any], size: int) -> list[Any]:
    """`fn(rank)` of all ranks side by side; their results, or the first one's exception."""
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            results[rank] = fn(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
