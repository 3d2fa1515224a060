"""Nested state comes back exactly as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from megavila.checkpoint.tree import CheckpointError, pack, unpack


def same(a: object, b: object) -> bool:
    """Equality down to the types, the bits of tensors and the sign of zero; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


def test_every_kind_of_value_round_trips() -> None:
    state = {
        "scalars": [
            None,
            True,
            False,
            0,
            -(2**80),
            0.1,
            -0.0,
            float("inf"),
            float("-inf"),
            float("nan"),
            "é\n",
        ],
        "keys": {1: "int", "1": "text", None: 0, 2.5: 1, True is None: 3},
        "empty": [{}, [], (), ""],
        "tensors": {"t": torch.randn(3, 5).t(), "zero-d": torch.tensor(3), "none": torch.empty(0, 4)},
        "dotted": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3)[:, ::2],
    }
    structure, tensors = pack(state, "state")
    assert same(unpack(structure, tensors), state)
    assert not same(unpack(structure, {**tensors, next(iter(tensors)): torch.zeros(5, 3)}), state)


def test_random_states_of_python_numpy_and_torch_round_trip() -> None:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    structure, tensors = pack(state, "rng")
    restored = unpack(structure, tensors)
    assert same(restored, state)
    first = (random.random(), np.random.rand(), torch.rand(3))
    random.setstate(restored["python"])
    np.random.set_state(restored["numpy"])
    torch.set_rng_state(restored["torch"])
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert first[:2] == again[:2] and torch.equal(first[2], again[2])


def test_a_value_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"optimizer.*param_groups.*is a function"):
        pack({"param_groups": [{"schedule": same}]}, "optimizer")
