"""Reading and writing the parts of a checkpoint: folders of safetensors files."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megavila.runtime.errors import MegavilaError


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """Tensors of several folders, read from disk one at a time when asked for.

    Args:
        directory: the checkpoint directory.
        parts: folder -> prefix that its tensors' names get. A folder that does not exist has no tensors.
    """

    def __init__(self, directory: Path, parts: dict[str, str]) -> None:
        self._where: dict[str, tuple[Path, str]] = {}
        for folder, prefix in parts.items():
            for path in sorted((directory / folder).glob("*.safetensors")):
                with _open(path) as file:
                    for name in file.keys():
                        self._where[prefix + name] = (path, name)
        if not self._where:
            folders = ", ".join(f"{folder}/" for folder in parts)
            raise MegavilaError(
                f"{directory} has no *.safetensors in {folders}; convert its weights to safetensors first"
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        path, key = self._where[name]
        with _open(path) as file:
            return file.get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        path, key = self._where[name]
        with _open(path) as file:
            return tuple(file.get_slice(key).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class ShardWriter:
    """Writes `model.safetensors`, or several files with an index when they exceed `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a copy."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Writes what is left and gives the files their final names."""
        if self._pending:
            self._flush()
        count = len(self._files)
        if count == 1:
            os.replace(self.folder / _partial_name(0), self.folder / "model.safetensors")
        elif count:
            weight_map = {}
            for index, names in enumerate(self._files):
                final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
                os.replace(self.folder / _partial_name(index), self.folder / final)
                weight_map |= dict.fromkeys(names, final)
            index_json = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n")

    def _flush(self) -> None:
        path = self.folder / _partial_name(len(self._files))
        save_file(self._pending, path, metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def _partial_name(index: int) -> str:
    return f"part-{index}.safetensors"


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MegavilaError(f"{path} cannot be read as safetensors: {error}") from None
