"""Rollouts by vLLM, which a `Host` runs in this process or in another one; only the files vllm*.py know vLLM.

vLLM gets each prompt as embeddings that the trainer made, so it needs the decoder only and cannot disagree
with the trainer about tokens, frames or positions. A group is one request with n = G: its prompt is read once,
and the other G - 1 responses find it in the prefix cache. See docs.vllm.ai, "Prompt Embedding Inputs".
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megavila.data.prompt import Prompt
from megavila.data.tokenizer import Tokenizer
from megavila.models import VisionLanguageModel
from megavila.models.families import get_family
from megavila.rollout.probe import WeightProbe
from megavila.rollout.protocol import (
    Response,
    RolloutCounts,
    RolloutError,
    SamplingParams,
    check_request,
)
from megavila.rollout.recovery import EngineGone, sample_all
from megavila.rollout.sharing import gather_shares, own_share
from megavila.rollout.stopping import StopChecker
from megavila.rollout.vllm_host import Host, LocalHost
from megavila.rollout.vllm_limits import check_model, check_prompts, check_sampling, check_server
from megavila.rollout.vllm_process import HostSettings
from megavila.rollout.vllm_requests import to_request, to_response
from megavila.rollout.vllm_server import ServerHost
from megavila.rollout.weights import (
    LANGUAGE_PART,
    WeightTransferError,
    checked_weights,
    language_weights,
    weight_manifest,
)
from megavila.runtime.collectives import broadcast_object, gather_objects
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger
from megavila.runtime.topology import Topology

_log = get_logger(__name__)

_BROKEN = "lost its weights in a transfer that broke off; start the run again from its last checkpoint"


class VllmEngine:
    """A `RolloutEngine` on vLLM.

    Every rank of a replica calls each method with the same arguments and gets the same responses. vLLM's tensor
    parallelism runs on the same ranks as the trainer's (`external_launcher`), with the same parts of the weights;
    context-parallel ranks share the prompts out among them.
    `update_weights` must have been called before the first `generate`. Close the engine, or use it in a `with`
    statement: vLLM's process groups must not outlive the trainer's.

    Args:
        model: the trainer's; makes the prompts' embeddings, and its weights are those that generate.
        tokenizer: decodes responses; its ``eos_id`` ends them.
        topology: supplies the tensor-parallel group.
        max_tokens: longest prompt and response together.
        kv_cache_gib: memory for keys and values on this rank, which must hold at least ``max_tokens``.
        timeout_seconds: an engine that computes nothing for so long has failed; None: it may.
        retries: how often prompts without responses are tried again after a failure, see `sample_all`. With tensor
            parallelism there is neither: ranks that work in step cannot give up on their own.
        placement: "colocated": vLLM runs in this process. "server": in one that each rank starts for itself, where it
            can be killed and started again whatever the other ranks do.

    Raises:
        MegavilaError: vLLM is not installed, or cannot run this model.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        topology: Topology,
        *,
        max_tokens: int,
        kv_cache_gib: float = 4.0,
        timeout_seconds: float | None = None,
        retries: int = 2,
        placement: Literal["colocated", "server"] = "colocated",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.topology = topology
        self.weight_version = 0
        """How often the weights were handed over."""
        self.restarts = 0
        """How often vLLM was started again after it had died."""
        self._device = model.language.output_weight().device
        self._max_tokens = min(max_tokens, model.language.config.max_position_embeddings)
        check_model(model, self._device)
        if placement == "server":
            check_server(topology.tensor, self._device)
        self._manifest = weight_manifest(model)
        self._probe = WeightProbe(model, self._max_tokens)
        self._can_stop_at_text = _has_files(tokenizer)
        alone = topology.tensor == 1
        self._timeout, self._retries = (timeout_seconds, retries) if alone else (None, 0)
        self._placement = placement
        self._settings = self._host_settings(kv_cache_gib)
        self._host: Host | None = self._open_host()
        self._asleep = False
        self._unusable: str | None = "has no weights yet; call update_weights before generate"
        self._counts = RolloutCounts()
        self._counted = self._running.counters()
        self._answer: Response | None = None  # to the probe, since the last transfer

    def generate(
        self,
        prompts: Sequence[Prompt],
        media_rows: Sequence[Tensor | None],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[tuple[Response, ...]]:
        """``params.group_size`` responses for each prompt; see `RolloutEngine.generate`.

        A response has at most as many tokens as the engine's ``max_tokens`` leaves after its prompt. Groups that were
        finished when vLLM failed are kept; the others are sampled again, with their seeds and so with the same result.

        Raises:
            EngineFailed: vLLM failed more than ``retries`` times.
            EngineGone: it cannot be started again.
        """
        check_request(prompts, media_rows, seeds)
        if self._unusable is not None:
            raise EngineGone(f"the vLLM engine {self._unusable}")
        check_sampling(params, self._can_stop_at_text)
        check_prompts(prompts, self._max_tokens)
        own = own_share(prompts, self.topology)
        groups = self._sample(
            [prompts[i] for i in own], [media_rows[i] for i in own], params, [seeds[i] for i in own]
        )
        # Tensor-parallel ranks each ran the scheduler: a difference would train them on different tokens.
        self._check_agreement(groups, self.topology.tensor_group)
        computed = 1 if params.temperature == 0 else params.group_size
        self._counts.decode_tokens += sum(
            len(response.token_ids) - 1 for group in groups for response in group[:computed]
        )
        return gather_shares(dict(zip(own, groups, strict=True)), self.topology)

    def update_weights(self) -> None:
        """Stream the trainer's weights into vLLM, forget what was computed with the old ones, and check it.

        Raises:
            WeightTransferError: a weight did not come, or the engine computes something else than the trainer.
                The engine then generates no more.
            EngineGone: vLLM has died and cannot be started again.
        """
        if self._unusable == _BROKEN:
            raise WeightTransferError(f"the vLLM engine {_BROKEN}")
        self.weight_version += 1
        reason = None
        try:
            self._load()
        except MegavilaError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:  # out of the exception's reach, which keeps the dead engine's memory
            self._counts.failures += 1
            self._restart(reason)
        # With the other ranks only now: they need not know which of them started vLLM again.
        self._check_agreement([(self._answered,)], self.topology.mrsp_group)  # who score it together
        self._probe.check(self._answered, self.weight_version)
        self._unusable = None

    @torch.no_grad()
    def _load(self) -> None:
        """The weights into vLLM, and its answer to the probe; on this rank alone, without tensor parallelism."""
        self._unusable = _BROKEN
        stream = checked_weights(language_weights(self.model), self._manifest)
        self._count()
        self._wake()
        self._running.load(stream, self.weight_version)
        self._unusable = "failed the check of its weights; call update_weights again"
        self._answer = self._ask_probe()
        self._counted = self._running.counters()  # what the probe cost is not a rollout's

    def sleep(self) -> None:
        """Free the GPU's memory until the next `update_weights` or `generate`. On a CPU only the caches are dropped."""
        try:
            self._running.sleep()
            self._asleep = True
        except Exception as error:
            _log.warning("vLLM did not go to sleep and keeps its memory: %s: %s", type(error).__name__, error)

    def _wake(self) -> None:
        if self._asleep:
            self._running.wake()
            self._asleep = False

    def take_counts(self) -> RolloutCounts:
        """The work since the last call, for the step's metrics: prompt tokens by vLLM's own cache counters."""
        self._count()
        counts, self._counts = self._counts, RolloutCounts()
        return counts

    def close(self) -> None:
        """Free vLLM's memory and leave its process groups. The trainer's groups stay."""
        if self._host is None:
            return
        self._unusable = "is closed"
        self._leave()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _running(self) -> Host:
        assert self._host is not None, "the engine is closed"
        return self._host

    @property
    def _answered(self) -> Response:
        assert self._answer is not None, "update_weights comes first"
        return self._answer

    def _host_settings(self, kv_cache_gib: float) -> HostSettings:
        # Weights arrive with an output layer of their own, see `language_weights`.
        language = replace(self.model.language.config, tie_word_embeddings=False)
        config, dtype = replace(self.model.config, language=language), str(self.model.dtype)
        dtype = dtype.removeprefix("torch.")
        return HostSettings(
            config=get_family(config.family).write_config(config, dtype)[f"{LANGUAGE_PART}/config.json"],
            dtype=dtype,
            device=self._device.type,
            tokenizer=self.tokenizer.directory if self._can_stop_at_text else None,
            max_tokens=self._max_tokens,
            kv_cache_gib=kv_cache_gib,
            tensor=self.topology.tensor,
            processes=self.topology.world_size,
            job=broadcast_object(uuid.uuid4().hex, self.topology.world_group),
        )

    def _open_host(self) -> Host:
        if self._placement == "colocated":
            return LocalHost(self._settings)
        largest = max(math.prod(shape) for shape in self._manifest.values()) * self.model.dtype.itemsize
        return ServerHost(self._settings, largest, self._timeout)

    def _recover(self) -> None:
        """After a failure: the engine as it is if it still answers the probe as before, else a new one.

        Raises EngineGone.
        """
        self._count()
        self._counts.failures += 1
        if self.topology.tensor > 1:
            self._unusable = _BROKEN
            raise EngineGone(
                f"vLLM failed on {self.topology.tensor} tensor-parallel ranks, which cannot recover on their own; start "
                "the run again from its last checkpoint"
            )
        before, reason = self._answered, self._illness()
        if reason is None:
            return
        self._restart(reason)
        if not self._probe.same(self._answered, before):
            raise EngineGone(
                f"vLLM has died ({reason}), and another one with the same weights answers otherwise than it did; start "
                "the run again from its last checkpoint"
            )
        self._unusable = None

    def _illness(self) -> str | None:
        """Why vLLM cannot go on, or None."""
        try:
            self._running.forget()  # blocks of a step that broke off may be marked as computed
            answer = self._ask_probe()
            self._counted = self._running.counters()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if self._probe.same(answer, self._answered) else "it answers otherwise than before"

    def _restart(self, reason: str) -> None:
        """A new vLLM with the trainer's weights in place of a dead one. Raises EngineGone."""
        self._unusable = _BROKEN
        if not self._running.restartable:
            raise EngineGone(
                f"vLLM has died ({reason}); in one of {self.topology.world_size} processes it cannot be started again, "
                "because its process groups are built by all of them together; start the run again from its last "
                "checkpoint, with rollout.placement=server if it happens again"
            )
        _log.warning("vLLM has died (%s) and is started again", reason)
        self._leave()
        try:
            self._host = self._open_host()
            self._counted = self._running.counters()
            self._load()
        except MegavilaError:
            raise
        except Exception as error:
            raise EngineGone(f"vLLM has died ({reason}) and could not be started again: {error}") from error
        self.restarts += 1

    def _leave(self) -> None:
        self._running.close()
        self._host, self._asleep = None, False

    def _ask_probe(self) -> Response:
        probe = self._probe
        ((_, group),) = self._attempt([probe.prompt], [None], probe.params, [probe.seed])
        return group[0]

    def _sample(
        self,
        prompts: Sequence[Prompt],
        media_rows: Sequence[Tensor | None],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[tuple[Response, ...]]:
        def sample(own: Sequence[int]) -> Iterator[tuple[int, tuple[Response, ...]]]:
            for place, group in self._attempt(
                [prompts[i] for i in own], [media_rows[i] for i in own], params, [seeds[i] for i in own]
            ):
                yield own[place], group

        names = [prompt.row.problem_id for prompt in prompts]
        return sample_all(names, sample, self._recover, retries=self._retries)

    def _attempt(
        self,
        prompts: Sequence[Prompt],
        media_rows: Sequence[Tensor | None],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> Iterator[tuple[int, tuple[Response, ...]]]:
        """(place of a prompt, its group) as they are finished. Whatever vLLM raises comes through."""
        self._wake()
        embeddings = [self._embed(prompt, rows) for prompt, rows in zip(prompts, media_rows, strict=True)]
        requests = [
            to_request(params, seed, self._max_tokens - len(prompt.token_ids), self.tokenizer.eos_id)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        stop = StopChecker(self.tokenizer, params.stop)
        outputs = self._running.run(embeddings, requests, self._timeout)
        with closing(outputs):
            for place, completions in outputs:
                group = [to_response(completion, stop) for completion in completions]
                # vLLM takes no n > 1 with temperature 0, whose responses are all the same.
                yield place, tuple(group * params.group_size if params.temperature == 0 else group)

    @torch.no_grad()
    def _embed(self, prompt: Prompt, rows: Tensor | None) -> Tensor:
        """(P, hidden) on the CPU, from where vLLM takes them."""
        device = self._device
        given = None if rows is None else rows.to(device)
        return self.model.embed(prompt.token_ids.to(device), prompt.media_index.to(device), given).cpu()

    def _check_agreement(self, groups: list[tuple[Response, ...]], ranks: ProcessGroup) -> None:
        own = hash(tuple(tuple(response.token_ids.tolist()) for group in groups for response in group))
        if any(other != own for other in gather_objects(own, ranks)):
            raise RolloutError("vLLM sampled different tokens on ranks that hold the same model and prompts")

    def _count(self) -> None:
        """Add what vLLM did since its counters were last read."""
        try:
            queries, hits = self._running.counters()
        except Exception as error:  # it has died; who next needs it will see to that
            _log.warning("what vLLM computed before it died is not counted: %s", error)
            return
        self._counts.reused_prompt_tokens += hits - self._counted[1]
        self._counts.prefill_tokens += queries - hits - (self._counted[0] - self._counted[1])
        self._counted = queries, hits


def _has_files(tokenizer: Tokenizer) -> bool:
    return tokenizer.directory is not None and (tokenizer.directory / "tokenizer.json").exists()
