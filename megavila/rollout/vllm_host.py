"""A vLLM in the process that it runs in: what the engine asks of it, in terms that can cross a process's border."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megavila.rollout.protocol import RolloutError
from megavila.rollout.vllm_process import (
    HostSettings,
    check_alone,
    finished_requests,
    import_vllm,
    shut_down,
    start_vllm,
    unchanged_process_state,
)

# Of a tensor's first byte in a block.
ALIGNMENT = 64


class Completion(NamedTuple):
    """One response as vLLM gives it."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    stop_reason: int | str | None


class Host(Protocol):
    """A vLLM, in this process or in another one. Any method may raise when it has failed."""

    restartable: bool
    """Whether another one can be made in its place, without the other ranks of the run."""

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the decoder's weights, in checkpoint format, and forget what was computed with older ones."""
        ...

    def run(
        self, embeddings: Sequence[Tensor], params: Sequence[Mapping[str, Any]], timeout_seconds: float | None
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        """(place, completions) of requests, as they finish.

        Args:
            embeddings: (P, hidden) of each prompt, on the CPU.
            params: arguments of vLLM's SamplingParams.
            timeout_seconds: raise TimeoutError after so long without progress.
        """
        ...

    def forget(self) -> None:
        """Drop cached keys, values and encoder outputs."""
        ...

    def sleep(self) -> None:
        """Free the accelerator's memory, until `wake`."""
        ...

    def wake(self) -> None:
        """Take it again."""
        ...

    def counters(self) -> tuple[int, int]:
        """Prompt tokens looked up in the prefix cache, and found there, since it started."""
        ...

    def close(self) -> None:
        """Free its memory. Of a dead one, what can still be freed."""
        ...


class LocalHost:
    """A `Host` in this process.

    Among several processes, all build theirs together: vLLM's process groups are parts of the run's.

    Args:
        backend: of vLLM's weight-transfer API; None: weights are handed over in memory.
    """

    def __init__(self, settings: HostSettings, backend: str | None = None) -> None:
        self.restartable = settings.processes == 1
        self._vllm = import_vllm(settings.device)
        check_alone()
        with unchanged_process_state():
            self.llm: Any = start_vllm(self._vllm, settings, backend)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        del version  # who shares a process with the trainer need not ask which weights it has
        # One parameter at a time, in checkpoint format: vLLM cuts, fuses and repacks it as when it loads a file.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.forget()

    def run(
        self,
        embeddings: Sequence[Tensor],
        params: Sequence[Mapping[str, Any]],
        timeout_seconds: float | None,
        heartbeat: Callable[[], None] | None = None,
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        inputs = [{"prompt_embeds": rows} for rows in embeddings]
        requests = [self._vllm.SamplingParams(**each) for each in params]
        outputs = finished_requests(self.llm, inputs, requests, timeout_seconds, heartbeat)
        with closing(outputs):
            for place, output in outputs:
                yield place, [_completion(each) for each in output.outputs]

    def forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM could not reset its prefix cache: requests are still running")
        self.llm.llm_engine.reset_encoder_cache()

    def sleep(self) -> None:
        # Level 1 keeps the weights in the CPU's memory, for who generates again with the same ones.
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()

    def counters(self) -> tuple[int, int]:
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        return int(values["vllm:prefix_cache_queries"]), int(values["vllm:prefix_cache_hits"])

    def close(self) -> None:
        shut_down(self.llm.llm_engine.engine_core)
        self.llm = None
        gc.collect()


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [found[token].logprob for token, found in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, logprobs, output.finish_reason, output.stop_reason)


def pack_weights(
    weights: Iterable[tuple[str, Tensor]], block: memoryview
) -> Iterator[list[tuple[str, str, list[int], int]]]:
    """Writes weights into ``block``, and yields (name, dtype, shape, offset) of what lies in it, block by block.

    The block is written again after each yield. Every weight must fit into it on its own.
    """
    found: list[tuple[str, str, list[int], int]] = []
    end = 0
    for name, tensor in weights:
        data = tensor.detach().cpu().contiguous()
        if end + data.nbytes > len(block):
            yield found
            found, end = [], 0
        place = torch.frombuffer(block, dtype=torch.uint8, count=data.nbytes, offset=end)
        place.copy_(data.view(-1).view(torch.uint8))
        found.append((name, str(data.dtype).removeprefix("torch."), list(data.shape), end))
        end = -(-(end + data.nbytes) // ALIGNMENT) * ALIGNMENT
    if found:
        yield found
