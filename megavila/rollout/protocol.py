"""What a rollout engine is given and what it returns: the types shared by every engine, the trainer and
evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megavila.data.prompt import Prompt
from megavila.runtime.errors import MegavilaError

FinishReason = Literal["stop", "length"]


class RolloutError(MegavilaError):
    """Sampling parameters, prompts or media rows that no engine can generate from."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn.

    The order of processing is temperature, then top-k, then top-p over what top-k left, as in transformers
    and vLLM.
    """

    max_tokens: int
    """Tokens of one response at most, the end-of-sequence token included."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy decoding (log-probs are then those of temperature 1)."""
    top_p: float = 1.0
    """Smallest set of most likely tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """The k most likely tokens (more where the k-th is tied); 0 keeps all."""
    stop: tuple[str, ...] = ()
    """A response ends once its text contains one of these; the text keeps the stop string and nothing after
    it.
    """
    group_size: int = 1
    """Responses per prompt (G)."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RolloutError(f"max_tokens is {self.max_tokens}; a response needs room for at least 1 token")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise RolloutError(f"temperature is {self.temperature}; use a finite value, 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"top_p is {self.top_p}; use a value in (0, 1], where 1 keeps every token")
        if self.top_k < 0:
            raise RolloutError(f"top_k is {self.top_k}; use 0 to keep every token, or a positive count")
        if self.group_size < 1:
            raise RolloutError(f"group_size is {self.group_size}; every prompt needs at least 1 response")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RolloutError(f"stop is {self.stop!r}; give a tuple of strings that are not empty")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Response:
    """One sampled continuation of a prompt.

    ``logprobs`` are those of the temperature-processed full softmax, *before* top-k and top-p: the
    distribution a trainer computes from its own logits, so that the two can be compared token by token
    whatever was truncated.
    """

    token_ids: Tensor
    """(R,) int64 on the CPU; keeps the end-of-sequence token and the tokens of a stop string."""
    logprobs: Tensor
    """(R,) float32 on the CPU."""
    text: str
    """The decoded tokens, without the end-of-sequence token; ends with the stop string where one ended it."""
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if self.token_ids.dim() != 1 or self.token_ids.shape != self.logprobs.shape:
            raise RolloutError(
                f"a response has {tuple(self.token_ids.shape)} token ids and {tuple(self.logprobs.shape)} "
                "log-probs; both must be (R,)"
            )
        if self.finish_reason not in ("stop", "length"):
            raise RolloutError(f'finish_reason is {self.finish_reason!r}; use "stop" or "length"')


@dataclass
class RolloutCounts:
    """Work of an engine since the counts were last taken."""

    prefill_tokens: int = 0
    """Prompt tokens that went through the model."""
    reused_prompt_tokens: int = 0
    """Prompt tokens that one prefill per response would have computed and sharing the prompt did not."""
    decode_tokens: int = 0
    """Response tokens that went through the model."""
    failures: int = 0
    """How often the engine failed and recovered."""


class RolloutEngine(Protocol):
    """Generates responses; the Megatron engine here, vLLM behind the same methods."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        media_rows: Sequence[Tensor | None],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[tuple[Response, ...]]:
        """``params.group_size`` responses for each prompt, in the order of the prompts.

        ``media_rows[i]``: (num_media_rows, hidden) embeddings of prompt i's media, or None where it has none.
        ``seeds[i]``: the only source of randomness of group i. Raises RolloutError for input that does not
        fit.
        """
        ...

    def update_weights(self) -> None:
        """Make the engine generate with the trainer's current weights; before the first `generate`, too."""
        ...

    def sleep(self) -> None:
        """Free the accelerator's memory until the next `update_weights` or `generate`, which wake it."""
        ...

    def take_counts(self) -> RolloutCounts:
        """The work since the last call."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it generates no more."""
        ...


def check_request(
    prompts: Sequence[Prompt], media_rows: Sequence[Tensor | None], seeds: Sequence[int]
) -> None:
    """Raises RolloutError where the three sequences, or a prompt and its media rows, do not match."""
    if not len(prompts) == len(media_rows) == len(seeds):
        raise RolloutError(
            f"{len(prompts)} prompts, {len(media_rows)} media rows and {len(seeds)} seeds; "
            "give one of each per prompt"
        )
    for index, (prompt, rows) in enumerate(zip(prompts, media_rows, strict=True)):
        if prompt.token_ids.numel() == 0:
            raise RolloutError(f"prompt {index} ({prompt.row.problem_id}) has no tokens")
        given = 0 if rows is None else rows.shape[0]
        if given != prompt.num_media_rows:
            raise RolloutError(
                f"prompt {index} ({prompt.row.problem_id}) holds {prompt.num_media_rows} media positions but "
                f"was given {given} media rows; encode exactly the frames of Prompt.videos"
            )
        if rows is not None and not torch.is_floating_point(rows):
            raise RolloutError(
                f"media rows of prompt {index} are {rows.dtype}; give floating-point embeddings"
            )
