"""What vLLM would get wrong, or die of, refused before it sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavila.data.prompt import Prompt
from megavila.models import VisionLanguageModel
from megavila.rollout.protocol import RolloutError, SamplingParams

_HEAD_DIMS_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def check_model(model: VisionLanguageModel, device: torch.device) -> None:
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


def check_server(tensor: int, device: torch.device) -> None:
    """Raises RolloutError where a vLLM in a process of its own cannot be had."""
    if tensor > 1:
        raise RolloutError(
            f"rollout.placement is server and parallel.tensor_parallel is {tensor}: a server belongs to one rank, which "
            "must have whole weights; use rollout.placement=colocated"
        )
    if device.type != "cpu":
        raise RolloutError(
            f"rollout.placement is server and the model is on {device.type}: weights go to a server through shared memory "
            "of the CPU; use rollout.placement=colocated"
        )


def check_sampling(params: SamplingParams, can_stop_at_text: bool) -> None:
    """Raises RolloutError for sampling whose log-probs or ends would not be the trainer's."""
    if params.temperature > 0 and (params.top_p < 1 or params.top_k > 0):
        # vLLM renormalises over the tokens that are left, and does not tell what it left out.
        raise RolloutError(
            f"top_p is {params.top_p} and top_k is {params.top_k}: vLLM's log-probs are then those of the "
            "truncated distribution, which a trainer cannot compare with its own; use top_p=1 top_k=0 or "
            "engine=megatron"
        )
    if params.stop and not can_stop_at_text:
        raise RolloutError(
            f"stop is {list(params.stop)}, but vLLM can find text only with a tokenizer in Hugging Face's "
            "layout (tokenizer.json); use one, or engine=megatron"
        )


def check_prompts(prompts: Sequence[Prompt], max_tokens: int) -> None:
    """Raises RolloutError, naming the row, for a prompt that vLLM would read otherwise or has no room for."""
    for prompt in prompts:
        if prompt.position_ids.dim() != 1:
            raise RolloutError(
                f"prompt {prompt.row.problem_id} has positions on 3 axes, which vLLM does not take with "
                "embeddings; use engine=megatron"
            )
        if len(prompt.token_ids) >= max_tokens:
            raise RolloutError(
                f"prompt {prompt.row.problem_id} has {len(prompt.token_ids)} tokens, which leaves no room for a "
                f"response in the engine's {max_tokens}; show fewer frames or raise the limit "
                "(grpo.max_tokens_per_microbatch, the model's max_position_embeddings)"
            )
