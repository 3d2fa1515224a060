"""One object a step in metrics.jsonl, and the same numbers for TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavila.runtime.errors import MegavilaError

if TYPE_CHECKING:
    from megavila.runtime.topology import Topology

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes step metrics under `run_dir`; does nothing on ranks other than the main one."""

    def __init__(self, run_dir: Path, topology: "Topology", *, tensorboard: bool = True) -> None:
        self._dir = run_dir
        self._path = run_dir / METRICS_FILE
        self._enabled = topology.is_main
        self._tensorboard = tensorboard
        self._board: Any = None
        self._purge_step: int | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one step; the line is in the file when this returns. NaN and infinity are kept as such."""
        if not self._enabled:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        numbers = {name: _number(value) for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self._tensorboard:
            if self._board is None:
                from torch.utils.tensorboard.writer import SummaryWriter  # a second of imports

                self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=self._purge_step)
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Forgets all steps after `step`: called when a run resumes from that step's checkpoint."""
        if not self._enabled:
            return
        self.close()
        self._purge_step = step + 1
        if not self._path.exists():
            return
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        temporary = self._path.with_name(METRICS_FILE + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def close(self) -> None:
        """Flushes TensorBoard's events."""
        if self._board is not None:
            self._board.close()
            self._board = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in order. A last line that a killed run left unfinished is ignored."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise MegavilaError(f"{path}:{number}: not a JSON object: {error}") from None
    return rows


def _number(value: Any) -> float | int:
    """Python numbers as they are; one-element tensors and numpy scalars by value."""
    return value if type(value) in (int, float) else float(value)
