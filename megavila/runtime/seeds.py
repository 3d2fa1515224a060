"""Randomness: seeds derived by name, and all generators of a process as one value."""

import hashlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:  # those who only derive seeds need not wait for Megatron-core's imports
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from megavila.runtime.topology import Topology


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from labels and numbers; the same on every machine and in every process.

    `derive_seed(seed, "rollout", step, row)`: streams that differ in any part are independent.
    """
    # repr keeps 1 and "1" apart; NUL cannot occur in it, so parts cannot run together.
    text = "\0".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, topology: "Topology") -> None:
    """Seeds Python, numpy, torch and Megatron's tracker.

    The default streams are equal on every rank, so that replicas initialise equally; Megatron's
    model-parallel stream differs between tensor-parallel ranks, for dropout on split activations.
    """
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derive_seed(seed, "torch"))
    tracker = _tracker()
    tracker.reset()
    base = derive_seed(seed, "megatron")
    tracker.add("data-parallel-rng", base)
    tracker.add("model-parallel-rng", derive_seed(base, "tensor", topology.tensor_rank))


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process; `torch.save`-able with weights_only loading."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": _listed(random.getstate()),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if _on_cuda() else None,
        "megatron": {name: state.clone() for name, state in _tracker().get_states().items()},
    }


def load_rng_state(state: dict[str, Any]) -> None:
    """Puts every generator back to what `rng_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and _on_cuda():
        torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states({n: s.clone() for n, s in state["megatron"].items()})


def _tracker() -> "CudaRNGStatesTracker":
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    assert tracker is not None  # created on the first call
    return tracker


def _on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value
