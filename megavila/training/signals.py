"""SIGTERM and SIGINT as a request to stop after the step at hand."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from megavila.runtime.collectives import gather_objects
from megavila.runtime.topology import Topology

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only leaves a note; the second has its usual effect.

    The note is shared: `asked` is the same on every rank, whichever of them was signalled.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def asked(self) -> int:
        """Return the signal that any rank received, 0 if none did. Called by all ranks together."""
        return max(gather_objects(self._received, self._topology.world_group))
