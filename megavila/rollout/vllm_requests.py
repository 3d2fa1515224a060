"""Our sampling parameters in vLLM's terms, and what vLLM answers in ours."""

from __future__ import annotations

import math
from typing import Any

import torch

from megavila.rollout.protocol import Response, RolloutError, SamplingParams
from megavila.rollout.stopping import StopChecker
from megavila.rollout.vllm_host import Completion
from megavila.runtime.seeds import derive_seed


def to_request(params: SamplingParams, seed: int, room: int, eos_id: int) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for one group.

    Args:
        seed: the group's.
        room: most tokens that a response can have after its prompt.
        eos_id: the token that ends a response; negative: none does.
    """
    return dict(
        n=1 if params.temperature == 0 else params.group_size,
        temperature=params.temperature,
        max_tokens=min(params.max_tokens, room),
        # Response i is drawn with seed + i: hashed, so that seeds in a row do not share their responses.
        seed=derive_seed("vllm", seed),
        logprobs=0,  # the sampled token's own
        # Our tokenizer says which token ends a response, not the one that vLLM read.
        ignore_eos=True,
        stop_token_ids=[eos_id] if eos_id >= 0 else None,
        stop=list(params.stop) or None,
        include_stop_str_in_output=bool(params.stop),
        detokenize=bool(params.stop),
    )


def to_response(completion: Completion, stop: StopChecker) -> Response:
    """The response as our engines give it.

    Raises:
        RuntimeError: the request died.
        RolloutError: log-probs are not finite, or vLLM stopped at a text that our tokenizer does not find.
    """
    ids, logprobs, reason = completion.token_ids, completion.logprobs, completion.finish_reason
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {reason!r} after {len(ids)} tokens")
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise RolloutError("vLLM returned log-probs that are not finite; the weights may have diverged")
    # vLLM decodes with its own tokenizer, rewards read ours: they must see the same end.
    if isinstance(completion.stop_reason, str) and not stop.completes(ids):
        raise RolloutError(
            f"vLLM found the stop string {completion.stop_reason!r} where {stop.text(ids)!r} has none: its "
            "tokenizer decodes differently; use engine=megatron or no stop strings"
        )
    return Response(torch.tensor(ids), torch.tensor(logprobs), stop.text(ids), reason)
