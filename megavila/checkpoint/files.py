"""Files of a checkpoint: written through to the disk, measured, and verified against what was measured."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavila.checkpoint.tree import CheckpointError, pack, unpack

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """What a file of a finished checkpoint must look like."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The last file written into a checkpoint: its presence says that all others are complete."""

    step: int
    sequence: int
    """How many checkpoints were written before it in this directory: the order in time, also after going back
    a step.
    """
    tensor: int
    pipeline: int
    world_size: int
    files: tuple[FileRecord, ...]
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        """Writes ``manifest.json`` through to the disk."""
        write_json(directory / MANIFEST, asdict(self))

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Raises CheckpointError if the file is missing, damaged or of another format."""
        path = directory / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"{path} has format {content['format']}; this version reads format {FORMAT}"
                )
            content["files"] = tuple(FileRecord(**record) for record in content["files"])
            return Manifest(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is missing or damaged ({error})") from error


@contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turns the disk's errors into CheckpointError with the path, the reason and, where it is full, the space
    left.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        where = path if path.exists() else path.parent
        hint = ""
        if full and where.exists():
            free = shutil.disk_usage(where).free / 2**30
            hint = f"; {free:.2f} GiB are free there, make room or lower keep_last"
        raise CheckpointError(f"cannot {action} {path}: {error}{hint}") from error


def write_state(directory: Path, name: str, state: Any) -> list[FileRecord]:
    """Writes nested ``state`` as ``<name>.json`` and ``<name>.safetensors``, through to the disk."""
    structure, tensors = pack(state, name)
    json_path, tensor_path = directory / f"{name}.json", directory / f"{name}.safetensors"
    write_json(json_path, structure)
    write_tensors(tensor_path, tensors)
    return [measure(json_path), measure(tensor_path)]


def read_state(directory: Path, name: str) -> Any:
    """The inverse of ``write_state``; tensors on the CPU."""
    structure = json.loads((directory / f"{name}.json").read_bytes())
    return unpack(structure, load_file(directory / f"{name}.safetensors"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file through to the disk; tensors that share memory are written once each."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    save_file(separate, path)
    _sync(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def measure(path: Path) -> FileRecord:
    """Size and checksum of a file as it is on the disk now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.name, path.stat().st_size, digest)


def problem_with(directory: Path, record: FileRecord) -> str | None:
    """Why the file is not what ``record`` says, or None if it is."""
    path = directory / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name} has {size} bytes instead of {record.size}"
        if measure(path) != record:
            return f"{record.name} has another checksum than when it was written"
    except OSError as error:
        return f"{record.name} cannot be read ({error.strerror})"
    return None


def sync_directory(path: Path) -> None:
    """Makes renames and new names inside ``path`` survive a power failure."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
