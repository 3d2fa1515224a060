"""Every change that Megatron-core 0.16.1 needs where there is no GPU.

`topology.initialize` applies them on the CPU platform and nowhere else. Megatron-core allocates its
communication buffers on `torch.cuda.current_device()` and keeps its random states in CUDA generators;
everything else that this repository uses of it runs on gloo as it is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

from megavila.runtime.errors import MegavilaError

_CPU = torch.device("cpu")


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named random states, over the CPU's default generator."""

    def add(self, name: str, seed: int) -> None:
        """Starts a named state from `seed`; a name may be added once."""
        if name in self.states_:
            raise MegavilaError(f"random state {name!r} exists already")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Inside, torch draws from the named state; outside it goes on where it was. May be nested."""
        if name not in self.states_:
            raise MegavilaError(f"random state {name!r} is not there; call seed_everything first")
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        if outer_name != "default-rng":
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_[outer_name] if outer_name != "default-rng" else outer_state)
            self._current_state_name = outer_name


def apply() -> None:
    """Makes Megatron-core run on the CPU. Doing it again changes nothing."""
    if is_applied():
        return
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.synchronize = _synchronize
    torch.Tensor.cuda = _tensor_cuda  # type: ignore[assignment]
    # One CPU generator serves both of the states that Megatron saves for recomputation.
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    megatron_random.CudaRNGStatesTracker = CpuRngTracker
    megatron_random._CUDA_RNG_STATE_TRACKER = None
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def is_applied() -> bool:
    """Whether this process computes on the CPU for good."""
    return torch.cuda.current_device is _current_device


def _current_device() -> torch.device:
    return _CPU


def _synchronize(device: Any = None) -> None:
    """Nothing is ever queued on a CPU."""


def _tensor_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _get_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)
