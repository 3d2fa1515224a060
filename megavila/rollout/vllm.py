"""Rollouts by vLLM, in this process and on this process's device: with `vllm_process`, all that knows vLLM.

vLLM gets each prompt as embeddings that the trainer made, so it needs the decoder only and cannot disagree
with the trainer about tokens, frames or positions. A group is one request with n = G: its prompt is read once,
and the other G - 1 responses find it in the prefix cache. See docs.vllm.ai, "Prompt Embedding Inputs".
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megavila.data.prompt import Prompt
from megavila.data.tokenizer import Tokenizer
from megavila.models import VisionLanguageModel
from megavila.models.convert import copy_tokenizer
from megavila.models.families import get_family
from megavila.rollout.probe import WeightProbe
from megavila.rollout.protocol import (
    Response,
    RolloutCounts,
    RolloutError,
    SamplingParams,
    check_request,
)
from megavila.rollout.sharing import gather_shares, own_share
from megavila.rollout.stopping import StopChecker
from megavila.rollout.vllm_process import check_alone, import_vllm, shut_down, unchanged_process_state
from megavila.rollout.weights import (
    LANGUAGE_PART,
    WeightTransferError,
    checked_weights,
    language_weights,
    weight_manifest,
)
from megavila.runtime.collectives import gather_objects
from megavila.runtime.errors import MegavilaError
from megavila.runtime.seeds import derive_seed
from megavila.runtime.topology import Topology

GIB = 2**30

# vLLM's block size on a CPU is 128 by default; only whole blocks of a prompt are shared.
_BLOCK_TOKENS_ON_CPU = 32
_BROKEN = "lost its weights in a transfer that broke off; start the run again from its last checkpoint"
_HEAD_DIMS_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


class VllmEngine:
    """A `RolloutEngine` on vLLM, in the trainer's process (colocated).

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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.topology = topology
        self.weight_version = 0
        """How often the weights were handed over."""
        self._device = model.language.output_weight().device
        self._max_tokens = min(max_tokens, model.language.config.max_position_embeddings)
        _check_model(model, self._device)
        self._manifest = weight_manifest(model)
        self._probe = WeightProbe(model, self._max_tokens)
        self._vllm = import_vllm(self._device)
        check_alone()
        self._can_stop_at_text = _has_files(tokenizer)
        with unchanged_process_state():
            self._llm: Any = self._start(kv_cache_gib)
        self._unusable: str | None = "has no weights yet; call update_weights before generate"
        self._counted = self._read_counters()
        self._decoded = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        media_rows: Sequence[Tensor | None],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[tuple[Response, ...]]:
        """``params.group_size`` responses for each prompt; see `RolloutEngine.generate`.

        A response has at most as many tokens as the engine's ``max_tokens`` leaves after its prompt.
        """
        check_request(prompts, media_rows, seeds)
        self._check(prompts, params)
        own = own_share(prompts, self.topology)
        groups = self._sample(
            [prompts[i] for i in own], [media_rows[i] for i in own], params, [seeds[i] for i in own]
        )
        # Tensor-parallel ranks each ran the scheduler: a difference would train them on different tokens.
        self._check_agreement(groups, self.topology.tensor_group)
        computed = 1 if params.temperature == 0 else params.group_size
        self._decoded += sum(len(response.token_ids) - 1 for group in groups for response in group[:computed])
        return gather_shares(dict(zip(own, groups, strict=True)), self.topology)

    @torch.no_grad()
    def update_weights(self) -> None:
        """Stream the trainer's weights into vLLM, forget what was computed with the old ones, and check it.

        Raises:
            WeightTransferError: a weight did not come, or the engine computes something else than the trainer.
                The engine then generates no more.
        """
        if self._unusable == _BROKEN:
            raise WeightTransferError(f"the vLLM engine {_BROKEN}")
        self._unusable = _BROKEN
        stream = checked_weights(language_weights(self.model), self._manifest)
        # One parameter at a time, in checkpoint format: vLLM cuts, fuses and repacks it as when it loads a file.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        self._unusable = "failed the check of its weights; call update_weights again"
        self._forget()
        self.weight_version += 1
        probe = self._probe
        answer = self._sample([probe.prompt], [None], probe.params, [probe.seed])
        self._check_agreement(answer, self.topology.mrsp_group)  # who score it together
        probe.check(answer[0][0], self.weight_version)
        self._counted = self._read_counters()  # what the probe cost is not a rollout's
        self._unusable = None

    def take_counts(self) -> RolloutCounts:
        """The work since the last call, for the step's metrics: prompt tokens by vLLM's own cache counters."""
        queries, hits = self._read_counters()
        counts = RolloutCounts(
            prefill_tokens=queries - hits - (self._counted[0] - self._counted[1]),
            reused_prompt_tokens=hits - self._counted[1],
            decode_tokens=self._decoded,
        )
        self._counted, self._decoded = (queries, hits), 0
        return counts

    def close(self) -> None:
        """Free vLLM's memory and leave its process groups. The trainer's groups stay."""
        if self._llm is None:
            return
        self._unusable = "is closed"
        shut_down(self._llm.llm_engine.engine_core)
        self._llm = None
        gc.collect()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, kv_cache_gib: float) -> Any:
        on_cpu = self._device.type == "cpu"
        config = self.model.config
        # Weights arrive with an output layer of their own, see `language_weights`.
        config = replace(config, language=replace(self.model.language.config, tie_word_embeddings=False))
        dtype = str(self.model.dtype).removeprefix("torch.")
        files = get_family(config.family).write_config(config, dtype)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(files[f"{LANGUAGE_PART}/config.json"]))
            try:
                return self._vllm.LLM(
                    model=directory,
                    tokenizer=self._copy_tokenizer(Path(directory)) if self._can_stop_at_text else None,
                    skip_tokenizer_init=not self._can_stop_at_text,
                    load_format="dummy",  # the trainer's weights come by `update_weights`
                    generation_config="vllm",
                    enable_prompt_embeds=True,
                    enable_prefix_caching=True,
                    logprobs_mode="processed_logprobs",  # after temperature; the default is before
                    disable_log_stats=False,  # they hold the cache counters
                    dtype=dtype,
                    max_model_len=self._max_tokens,
                    kv_cache_memory_bytes=int(kv_cache_gib * GIB),
                    tensor_parallel_size=self.topology.tensor,
                    # Where torchrun started several ranks, each builds an engine and vLLM's groups follow theirs.
                    distributed_executor_backend="external_launcher"
                    if self.topology.world_size > 1
                    else "uni",
                    enforce_eager=on_cpu,
                    **({"block_size": _BLOCK_TOKENS_ON_CPU} if on_cpu else {}),
                )
            except ValueError as error:  # vLLM's own check of its settings, pydantic's among them
                raise MegavilaError(
                    f"vLLM cannot run this model with {self._max_tokens} tokens of context and "
                    f"rollout.kv_cache_gib {kv_cache_gib}: {error}"
                ) from error

    def _copy_tokenizer(self, directory: Path) -> str:
        """The tokenizer in a folder of its own: beside a config.json of type qwen2, transformers would decode with
        Qwen2's bytes whatever the file says. vLLM wants some config.json there; a tower's names no tokenizer.
        """
        folder = directory / "tokenizer"
        folder.mkdir()
        assert self.tokenizer.directory is not None
        copy_tokenizer(self.tokenizer.directory, folder)
        (folder / "config.json").write_text('{"model_type": "siglip_vision_model"}')
        return str(folder)

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        if self._unusable is not None:
            raise RolloutError(f"the vLLM engine {self._unusable}")
        if params.temperature > 0 and (params.top_p < 1 or params.top_k > 0):
            # vLLM renormalises over the tokens that are left, and does not tell what it left out.
            raise RolloutError(
                f"top_p is {params.top_p} and top_k is {params.top_k}: vLLM's log-probs are then those of the "
                "truncated distribution, which a trainer cannot compare with its own; use top_p=1 top_k=0 or "
                "engine=megatron"
            )
        if params.stop and not self._can_stop_at_text:
            raise RolloutError(
                f"stop is {list(params.stop)}, but vLLM can find text only with a tokenizer in Hugging Face's "
                "layout (tokenizer.json); use one, or engine=megatron"
            )
        for prompt in prompts:
            if prompt.position_ids.dim() != 1:
                raise RolloutError(
                    f"prompt {prompt.row.problem_id} has positions on 3 axes, which vLLM does not take with "
                    "embeddings; use engine=megatron"
                )
            if len(prompt.token_ids) >= self._max_tokens:
                raise RolloutError(
                    f"prompt {prompt.row.problem_id} has {len(prompt.token_ids)} tokens, which leaves no room for a "
                    f"response in the engine's {self._max_tokens}; show fewer frames or raise the limit "
                    "(grpo.max_tokens_per_microbatch, the model's max_position_embeddings)"
                )

    @torch.no_grad()
    def _sample(
        self,
        prompts: Sequence[Prompt],
        media_rows: Sequence[Tensor | None],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[tuple[Response, ...]]:
        if not prompts:
            return []
        embeddings = [
            {"prompt_embeds": self._embed(prompt, rows)}
            for prompt, rows in zip(prompts, media_rows, strict=True)
        ]
        requests = [self._request(prompt, params, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        outputs = self._llm.generate(embeddings, requests, use_tqdm=False)
        stop = StopChecker(self.tokenizer, params.stop)
        groups = []
        for output in outputs:
            group = [self._response(completion, stop) for completion in output.outputs]
            # vLLM takes no n > 1 with temperature 0, whose responses are all the same.
            groups.append(tuple(group * params.group_size if params.temperature == 0 else group))
        return groups

    def _embed(self, prompt: Prompt, rows: Tensor | None) -> Tensor:
        """(P, hidden) on the CPU, from where vLLM takes them."""
        device = self._device
        given = None if rows is None else rows.to(device)
        return self.model.embed(prompt.token_ids.to(device), prompt.media_index.to(device), given).cpu()

    def _request(self, prompt: Prompt, params: SamplingParams, seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=1 if params.temperature == 0 else params.group_size,
            temperature=params.temperature,
            max_tokens=min(params.max_tokens, self._max_tokens - len(prompt.token_ids)),
            # Response i is drawn with seed + i: hashed, so that seeds in a row do not share their responses.
            seed=derive_seed("vllm", seed),
            logprobs=0,  # the sampled token's own
            # Our tokenizer says which token ends a response, not the one that vLLM read.
            ignore_eos=True,
            stop_token_ids=[self.tokenizer.eos_id] if self.tokenizer.eos_id >= 0 else None,
            stop=list(params.stop) or None,
            include_stop_str_in_output=bool(params.stop),
            detokenize=bool(params.stop),
        )

    def _response(self, completion: Any, stop: StopChecker) -> Response:
        ids = list(completion.token_ids)
        logprobs = [found[token].logprob for token, found in zip(ids, completion.logprobs, strict=True)]
        if completion.finish_reason not in ("stop", "length"):
            raise RolloutError(
                f"vLLM ended a response with {completion.finish_reason!r} after {len(ids)} tokens"
            )
        if not all(math.isfinite(logprob) for logprob in logprobs):
            raise RolloutError("vLLM returned log-probs that are not finite; the weights may have diverged")
        reason = completion.finish_reason
        if isinstance(completion.stop_reason, str):
            # vLLM decodes with its own tokenizer, rewards read ours: they must see the same end.
            if not stop.completes(ids):
                raise RolloutError(
                    f"vLLM found the stop string {completion.stop_reason!r} where {stop.text(ids)!r} has none: its "
                    "tokenizer decodes differently; use engine=megatron or no stop strings"
                )
        return Response(torch.tensor(ids), torch.tensor(logprobs), stop.text(ids), reason)

    def _check_agreement(self, groups: list[tuple[Response, ...]], ranks: ProcessGroup) -> None:
        own = hash(tuple(tuple(response.token_ids.tolist()) for group in groups for response in group))
        if any(other != own for other in gather_objects(own, ranks)):
            raise RolloutError("vLLM sampled different tokens on ranks that hold the same model and prompts")

    def _forget(self) -> None:
        """Drop cached keys, values and encoder outputs, which belong to the old weights."""
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM could not reset its prefix cache: requests are still running")
        self._llm.llm_engine.reset_encoder_cache()

    def _read_counters(self) -> tuple[int, int]:
        """Prompt tokens looked up in the prefix cache, and found there, since the engine started."""
        values = {metric.name: getattr(metric, "value", 0) for metric in self._llm.get_metrics()}
        return int(values["vllm:prefix_cache_queries"]), int(values["vllm:prefix_cache_hits"])


def _check_model(model: VisionLanguageModel, device: torch.device) -> None:
    """Raises RolloutError for what vLLM would get wrong, or dies of at its first step."""
    config = model.language.config
    if config.mrope_section is not None:
        raise RolloutError(
            "the model has 3-D rotary embeddings, which vLLM silently replaces by 1-D ones for prompts given as "
            "embeddings; use rollout.engine=megatron"
        )
    if config.qkv_bias and config.head_dim * config.num_heads != config.hidden_size:
        raise RolloutError(
            f"head_dim {config.head_dim} x num_heads {config.num_heads} is not hidden_size {config.hidden_size}: vLLM's "
            "Qwen2 has no head_dim of its own; use rollout.engine=megatron"
        )
    if device.type == "cpu" and config.head_dim not in _HEAD_DIMS_ON_CPU:
        raise RolloutError(
            f"head_dim is {config.head_dim}, vLLM's attention on a CPU needs one of {list(_HEAD_DIMS_ON_CPU)}; "
            "use rollout.engine=megatron"
        )
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RolloutError(
            f"the model's type is {model.dtype}, vLLM runs float32, bfloat16 and float16; set model.dtype"
        )


def _has_files(tokenizer: Tokenizer) -> bool:
    return tokenizer.directory is not None and (tokenizer.directory / "tokenizer.json").exists()
