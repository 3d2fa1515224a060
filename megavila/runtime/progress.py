"""Progress with an estimate of the time left: a bar on a terminal, a line now and then in a log file."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """`with Progress("SFT", total) as bar: bar.advance(text="loss 0.31")`. Silent where not `enabled`."""

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        enabled: bool = True,
        completed: int = 0,
        console: Console | None = None,
    ) -> None:
        self._description = description
        self._total = total
        self._enabled = enabled
        self._first = self._completed = completed
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if self._enabled and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            bar = self._bar = RichProgress(*columns, console=self._console)
            bar.start()
            self._task = bar.add_task(
                self._description, total=self._total, completed=self._completed, text=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1, *, text: str = "") -> None:
        """Counts `count` more items done; `text` is shown beside the bar."""
        self._completed += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count, text=text)
        elif self._enabled:
            self._print_line(text)

    def _print_line(self, text: str) -> None:
        now = time.monotonic()
        finished = self._total is not None and self._completed >= self._total
        if not finished and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        elapsed = now - self._started
        line = f"{self._description}: {self._completed}"
        if self._total is not None:
            left = (self._total - self._completed) * elapsed / max(self._completed - self._first, 1)
            line += f"/{self._total}, {elapsed:.0f} s, about {left:.0f} s left"
        self._console.print(f"{line}  {text}".rstrip(), markup=False, highlight=False)


def track(
    items: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Yields `items` while showing progress; pass `enabled=topology.is_main` where ranks run side by side."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(description, total, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.advance()
