"""Encoded videos on disk, for later epochs and later runs with the same frozen weights."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavila.mrsp.store import StoreCounters, StoreKey
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger

_log = get_logger(__name__)
_NAME = "frames"


class DiskStore:
    """Slices of encoded videos as files `<video>/<weights>/<start>-<stop>.safetensors`, named by frames.

    Any rank reads whatever part of a file it needs, so another number of ranks finds them too. A file appears
    whole (written aside, then renamed) and carries the checksum of its values.
    """

    def __init__(self, directory: Path, counters: StoreCounters) -> None:
        self.directory = directory
        self.counters = counters
        self.writable = True
        self._warned_stale = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MegavilaError(
                f"mrsp.store_dir {directory} cannot be made ({error}); name a directory that can be written, or null"
            ) from error

    def read(self, key: StoreKey, start: int, stop: int, pooling: int) -> list[tuple[int, int, Tensor]]:
        """Parts of the frames [start, stop) that are on disk: disjoint (start, stop, windows) in order.

        A file that cannot be read is removed, with a warning.
        """
        folder = self._folder(key)
        if not folder.is_dir():
            self._note_stale(key)
            return []
        found, at = [], start
        for first, last, path in sorted(_slices(folder)):
            begin, end = max(first, at), min(last, stop)
            if begin >= end or (rows := self._load(path, key)) is None:
                continue
            # Files begin and end at whole windows (of `pooling` frames), and so does what is asked for.
            part = rows[(begin - first) // pooling : -(-(end - first) // pooling)]
            found.append((begin, end, part))
            at = end
        self.counters.frames_from_disk += sum(end - begin for begin, end, _ in found)
        return found

    def write(self, key: StoreKey, start: int, stop: int, rows: Tensor) -> None:
        """Keep the windows of frames [start, stop); where the disk does not take them, warn and write no more."""
        if not self.writable:
            return
        folder = self._folder(key)
        rows = rows.detach().cpu().contiguous()
        temporary = folder / f"{start}-{stop}.{uuid.uuid4().hex}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({_NAME: rows}, temporary, {"checksum": _checksum(rows), "key": _describe(key)})
            os.replace(temporary, folder / f"{start}-{stop}.safetensors")
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            # Not raised: other ranks would wait for one that met this, and the rows themselves are sound.
            self.writable = False
            _log.warning(
                f"{folder}: encoded frames cannot be written ({error}); this rank keeps no more of them on disk. Free "
                "some space or set mrsp.store_dir to null"
            )

    def _load(self, path: Path, key: StoreKey) -> Tensor | None:
        try:
            with safe_open(str(path), "pt") as file:
                metadata, rows = file.metadata() or {}, file.get_tensor(_NAME)
            why = (
                "" if metadata.get("checksum") == _checksum(rows) else "its checksum does not fit its values"
            )
            if not why and metadata.get("key") != _describe(key):
                why = "it was written for other frames or weights"
        except (OSError, SafetensorError) as error:
            rows, why = torch.zeros(0), str(error)
        if not why:
            return rows
        self.counters.corrupt += 1
        _log.warning(f"{path}: {why}; its frames are encoded again and it is removed, where that is allowed")
        with contextlib.suppress(OSError):  # another user's file, a disk that is read only
            path.unlink()
        return None

    def _folder(self, key: StoreKey) -> Path:
        return self.directory / key.video / key.weights

    def _note_stale(self, key: StoreKey) -> None:
        """Count a video that is there with other weights only."""
        if not (self.directory / key.video).is_dir():
            return
        self.counters.stale += 1
        if not self._warned_stale:
            self._warned_stale = True
            _log.warning(
                f"{self.directory} holds videos that were encoded with other weights; they are encoded again (files "
                "of weights that are no longer used can be deleted)"
            )


def _slices(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(start, stop, file) of each slice in a folder."""
    for path in folder.glob("*.safetensors"):
        start, _, stop = path.stem.partition("-")
        if start.isdecimal() and stop.isdecimal():
            yield int(start), int(stop), path


def _checksum(rows: Tensor) -> str:
    digest = hashlib.blake2b(f"{tuple(rows.shape)}{rows.dtype}".encode(), digest_size=16)
    digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe(key: StoreKey) -> str:
    return f"{key.video}/{key.weights}"
