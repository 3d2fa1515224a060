"""Checkpoints that are whole or absent: written aside, verified by checksum, renamed into place, kept to the
last k.

```
<directory>/step_00000010/            only ever appears complete
    model-tp0-pp0.safetensors         one per tensor and pipeline rank, from its first data and context rank
    optimizer-tp0-pp0.{json,safetensors}
    rng-rank00000.{json,safetensors}  one per rank
    state.{json,safetensors}          data position and whatever else is the same on all ranks
    manifest.json                     names, sizes and checksums of the above; written last
<directory>/step_00000020.tmp/        being written, or left by a run that was killed: never read
```
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from safetensors.torch import load_file
from torch import Tensor

from megavila.checkpoint.files import (
    MANIFEST,
    FileRecord,
    Manifest,
    disk_errors,
    measure,
    problem_with,
    read_state,
    sync_directory,
    write_state,
    write_tensors,
)
from megavila.checkpoint.tree import CheckpointError
from megavila.runtime.collectives import gather_objects
from megavila.runtime.logging import get_logger
from megavila.runtime.topology import Topology

logger = get_logger(__name__)
T = TypeVar("T")

_FINISHED = re.compile(r"step_\d{8,}")
_LEFT_OVER = re.compile(r"step_\d{8,}\.(tmp|old)")


@dataclass(frozen=True)
class Checkpoint:
    """What one rank gets back: exactly what it, or its shard's writer, saved. Tensors are on the CPU."""

    step: int
    path: Path
    model: dict[str, Tensor]
    optimizer: Any
    rng: Any | None
    """None where the run had another number of ranks: their random states cannot be dealt out again."""
    data: Any
    extra: Any


class CheckpointManager:
    """Saves and loads checkpoints of one run. Every method is called by all ranks together.

    The directory must be one that all ranks see. An error on one rank is raised on all of them, as
    CheckpointError.
    """

    def __init__(self, directory: str | Path, keep_last: int, topology: Topology) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}; keep at least 1 checkpoint")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.topology = topology

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Any,
        rng: Any,
        data: Any,
        extra: Any = None,
    ) -> Path:
        """Writes the checkpoint of ``step`` and removes all but the last ``keep_last``; returns its path.

        ``model``: this rank's shard. ``optimizer`` and ``rng``: this rank's, nested as ``tree.pack`` allows.
        ``data`` and ``extra`` must be the same on every rank: the main rank's are saved. An existing
        checkpoint of the same step is replaced. Raises CheckpointError if the disk fails; what was there
        before is then still there.
        """
        final = self.directory / f"step_{step:08d}"
        unfinished = final.with_suffix(".tmp")
        self._agree(lambda: self._prepare(unfinished))
        try:
            own = self._agree(lambda: self._write(unfinished, model, optimizer, rng, data, extra))
            records = tuple(chain.from_iterable(self._gather(own)))
            self._agree(lambda: self._publish(unfinished, final, step, records))
        except Exception:
            if self.topology.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return final

    def latest(self) -> Path | None:
        """The checkpoint written last, by its manifest; its other files are verified when it is loaded."""
        found = self._candidates()
        return found[0] if found else None

    def load(self, source: Literal["auto"] | str | Path) -> Checkpoint | None:
        """Reads a checkpoint after verifying every file of it against the manifest.

        "auto": the one written last that is intact, or None if there is none; a damaged one is named in a
        warning and passed over. A path: that one; raises CheckpointError if it is damaged. Raises it too
        where the run's tensor or pipeline degree is not the checkpoint's.
        """
        if source != "auto":
            path = Path(source)
            problems = self._problems(path)
            if problems:
                raise CheckpointError(f"checkpoint {path} is damaged or incomplete: {'; '.join(problems)}")
            return self._agree(partial(self._read, path))
        for path in self._candidates():
            problems = self._problems(path)
            if not problems:
                return self._agree(partial(self._read, path))
            self._warn("checkpoint %s is damaged and passed over: %s", path, "; ".join(problems))
        return None

    # Writing

    def _prepare(self, unfinished: Path) -> None:
        if not self.topology.is_main:
            return
        with disk_errors("create", unfinished):
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _LEFT_OVER.fullmatch(path.name):
                    shutil.rmtree(path)
            unfinished.mkdir()

    def _write(
        self, unfinished: Path, model: Mapping[str, Tensor], optimizer: Any, rng: Any, data: Any, extra: Any
    ) -> list[FileRecord]:
        topology = self.topology
        records: list[FileRecord] = []
        with disk_errors("write into", unfinished):
            if topology.data_rank == 0 and topology.context_rank == 0:
                path = unfinished / f"model-{self._shard}.safetensors"
                write_tensors(path, model)
                records.append(measure(path))
                records += write_state(unfinished, f"optimizer-{self._shard}", optimizer)
            records += write_state(unfinished, self._rng_name, rng)
            if topology.is_main:
                records += write_state(unfinished, "state", {"data": data, "extra": extra})
        return records

    def _publish(self, unfinished: Path, final: Path, step: int, files: tuple[FileRecord, ...]) -> None:
        if not self.topology.is_main:
            return
        absent = [record.name for record in files if not (unfinished / record.name).exists()]
        if absent:
            raise CheckpointError(
                f"{', '.join(absent)} of other ranks are not in {unfinished}; "
                "set checkpoint.directory to a directory that all ranks share"
            )
        previous = [Manifest.read(path).sequence for path in self._newest_first()[:1]]
        degrees = self.topology
        manifest = Manifest(
            step=step,
            sequence=previous[0] + 1 if previous else 0,
            tensor=degrees.tensor,
            pipeline=degrees.pipeline,
            world_size=degrees.world_size,
            files=files,
        )
        with disk_errors("finish", final):
            manifest.write(unfinished)
            sync_directory(unfinished)
            if final.exists():
                final.rename(final.with_suffix(".old"))
            unfinished.rename(final)
            sync_directory(self.directory)
            for path in [final.with_suffix(".old"), *self._newest_first()[self.keep_last :]]:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Renames before deleting, so that a kill in between leaves no half-deleted checkpoint under a valid
        name.
        """
        doomed = path.with_suffix(".old")
        if path != doomed:
            path.rename(doomed)
        if doomed.exists():
            shutil.rmtree(doomed)

    # Reading

    def _newest_first(self) -> list[Path]:
        """Finished checkpoints of the directory, last written first; one without a readable manifest is
        warned about.
        """
        if not self.directory.is_dir():
            return []
        found: list[tuple[int, Path]] = []
        for path in sorted(self.directory.iterdir()):
            if not _FINISHED.fullmatch(path.name):
                continue
            try:
                found.append((Manifest.read(path).sequence, path))
            except CheckpointError as error:
                logger.warning("checkpoint %s is passed over: %s", path, error)
        return [path for _, path in sorted(found, reverse=True)]

    def _candidates(self) -> list[Path]:
        """The main rank's ``_newest_first`` on every rank."""
        return self._gather(self._agree(lambda: self._newest_first() if self.topology.is_main else []))[0]

    def _problems(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint, the same list on every rank; the ranks divide the files among
        them.
        """
        return list(dict.fromkeys(chain.from_iterable(self._gather(self._own_problems(path)))))

    def _own_problems(self, path: Path) -> list[str]:
        if not (path / MANIFEST).exists():
            return [f"it has no {MANIFEST}, so it is not a finished checkpoint"]
        try:
            files = Manifest.read(path).files
        except CheckpointError as error:
            return [str(error)]
        mine = files[self.topology.rank :: self.topology.world_size]
        return [text for record in mine if (text := problem_with(path, record))]

    def _read(self, path: Path) -> Checkpoint:
        manifest, topology = Manifest.read(path), self.topology
        for name in ("tensor", "pipeline"):
            saved, wanted = getattr(manifest, name), getattr(topology, name)
            if saved != wanted:
                raise CheckpointError(
                    f"checkpoint {path} was saved with {name} parallel degree {saved}, this run has "
                    f"{wanted}; resume with parallel.{name}_parallel={saved}, or export the checkpoint to HF "
                    "format and start from that (weights only: the optimizer starts anew)"
                )
        same_ranks = manifest.world_size == topology.world_size
        if not same_ranks:
            self._warn(
                "checkpoint %s was saved by %d ranks and is resumed by %d: random states are not restored",
                path,
                manifest.world_size,
                topology.world_size,
            )
        with disk_errors("read", path):
            state = read_state(path, "state")
            return Checkpoint(
                step=manifest.step,
                path=path,
                model=load_file(path / f"model-{self._shard}.safetensors"),
                optimizer=read_state(path, f"optimizer-{self._shard}"),
                rng=read_state(path, self._rng_name) if same_ranks else None,
                data=state["data"],
                extra=state["extra"],
            )

    # Ranks

    @property
    def _shard(self) -> str:
        return f"tp{self.topology.tensor_rank}-pp{self.topology.pipeline_rank}"

    @property
    def _rng_name(self) -> str:
        return f"rng-rank{self.topology.rank:05d}"

    def _warn(self, message: str, *values: object) -> None:
        """Once, not once per rank."""
        if self.topology.is_main:
            logger.warning(message, *values)

    def _agree(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on every rank and returns its own result; a failure on one is raised on all."""
        failure: Exception | None = None
        result: T | None = None
        try:
            result = action()
        except Exception as error:  # whatever it is, the other ranks wait in the gather below
            failure = error
        messages = self._gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise CheckpointError(f"rank {rank}: {message}")
        return cast(T, result)

    def _gather(self, value: T) -> list[T]:
        return gather_objects(value, self.topology.world_group)
