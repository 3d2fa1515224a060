"""Named stopwatches whose seconds go to the step's metrics."""

import contextlib
import time
from collections.abc import Iterator

from megavila.runtime.platform import Platform


class Timers:
    """`with timers("time/update"): ...` adds to that name; `pop` hands all sums over and starts anew.

    Waits for the device before reading the clock, so that queued GPU work counts where it was queued.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `name`, also where an exception leaves it."""
        self._platform.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._platform.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def enter(self, *names: str) -> None:
        """Names that the next `pop` has in any case, with 0 seconds where nothing was timed."""
        for name in names:
            self._seconds.setdefault(name, 0.0)

    def pop(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
