"""Peak memory of a stretch of work, on a GPU or of a CPU process."""

import ctypes
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from megavila.runtime.platform import Platform

_GIB = 2**30
_EVERY_SECONDS = 0.005


class MemoryPeak:
    """`with MemoryPeak(platform) as peak: …; peak.gib` is the most memory held at once in between.

    On a GPU: tensors, exactly. On a CPU: the resident set, looked at every 5 ms, less what it was at the start, when
    the allocator had given back what it held in reserve.
    """

    def __init__(self, platform: Platform) -> None:
        self._cuda = platform.name == "cuda"
        self._stop = threading.Event()
        self.gib = 0.0

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return self
        _give_back()
        self._start = self._most = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.gib = torch.cuda.max_memory_allocated() / _GIB
            return
        self._stop.set()
        self._thread.join()
        self.gib = (self._most - self._start) / _GIB

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_SECONDS):
            self._most = max(self._most, _resident())


def _give_back() -> None:
    """Free memory that the C library keeps would hide what the next allocations take; glibc alone has a call for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
