"""Nested training state as named tensors plus JSON, exactly and without pickle.

Dictionaries (keys of any scalar type), lists, tuples, tensors, NumPy arrays and plain scalars come back as
they were: tensors bit for bit, floats by their shortest exact representation, −inf and NaN included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavila.runtime.errors import MegavilaError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
_SCALARS = (bool, int, float, str)


class CheckpointError(MegavilaError):
    """A checkpoint that cannot be written, found, trusted or used for this run."""


def pack(state: Any, name: str) -> tuple[Json, dict[str, Tensor]]:
    """``state`` as JSON that refers to tensors by name, and those tensors on the CPU.

    ``name`` starts the path by which an error names a value that cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(state, name, tensors), tensors


def unpack(packed: Json, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``pack``."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    match kind, content:
        case "tensor", str():
            return tensors[content]
        case "array", str():
            return tensors[content].numpy()
        case "tuple", list():
            return tuple(unpack(item, tensors) for item in content)
        case "dict", list():
            return {unpack(key, tensors): unpack(value, tensors) for key, value in content}  # type: ignore[misc]
    raise CheckpointError(
        f"unknown kind {kind!r} of saved value; the checkpoint was written by a newer version"
    )


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Json:
    if value is None or type(value) in _SCALARS:
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(np.array(value))
        return {"array": path}
    if isinstance(value, np.generic):
        return _pack(value.item(), path, tensors)
    if isinstance(value, list):
        return [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        # Pairs, not an object: JSON would turn integer keys (an optimizer's parameter numbers) into strings.
        pairs: list[Json] = []
        for number, (key, item) in enumerate(value.items()):
            # The number keeps paths apart that keys alone would not: 1 and "1", or a key that holds a dot.
            pairs.append([_pack(key, f"{path}.key", tensors), _pack(item, f"{path}.{number}:{key}", tensors)])
        return {"dict": pairs}
    raise CheckpointError(
        f"{path} is a {type(value).__name__}, which cannot be saved; "
        "use dicts, lists, tuples, tensors, NumPy arrays, numbers, strings, booleans or None"
    )
