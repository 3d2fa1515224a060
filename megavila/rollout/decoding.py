"""The responses of one batch while they are decoded: what was drawn, which rows still run, where each one
continues.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megavila.rollout.attention import DecodeAttention
from megavila.rollout.kv_cache import PromptCache, ResponseCache
from megavila.rollout.protocol import FinishReason, Response, SamplingParams
from megavila.rollout.sampling import group_uniforms
from megavila.rollout.stopping import StopChecker

# Rows that have ended are decoded along, unread, until this share of the rows is left; then the caches are
# copied without them. Lower wastes more decoding, higher copies more often.
COMPACT_AT = 0.8


class Decoding:
    """G responses for each of B prompts, decoded in step: every row that runs has the same number of tokens.

    Rows are responses, groups one after the other: row b · G + g is response g of prompt b. ``running`` lists
    the rows that the next forward pass computes.
    """

    def __init__(
        self,
        prompts: PromptCache,
        next_positions: Sequence[int],
        seeds: Sequence[int],
        params: SamplingParams,
        stop: StopChecker,
        eos_id: int,
        device: torch.device,
    ) -> None:
        groups, size = len(seeds), params.group_size
        self._params, self._stop, self._eos_id, self._device = params, stop, eos_id, device
        self._prompts, self._responses = prompts, ResponseCache(params.max_tokens)
        self._uniforms = torch.cat([group_uniforms(seed, size, params.max_tokens) for seed in seeds]).to(
            device
        )
        self._tokens: list[list[int]] = [[] for _ in range(groups * size)]
        self._logprobs: list[list[float]] = [[] for _ in range(groups * size)]
        self._reasons: list[FinishReason | None] = [None] * (groups * size)
        self._left = groups * size
        self.running = torch.arange(groups * size)
        self._prompt_of_row = self.running // size
        self._next_positions = torch.tensor(next_positions).repeat_interleave(size).to(device)
        self.steps = 0
        """Tokens that every running row has."""
        self._rebuild()

    @property
    def finished(self) -> bool:
        """Whether every response has ended."""
        return self._left == 0

    @property
    def attention(self) -> DecodeAttention:
        """The strategy of the next forward pass over the running rows."""
        return self._attention

    @property
    def uniforms(self) -> Tensor:
        """(running rows,) numbers that draw the next token."""
        return self._uniforms[self._running_on_device, self.steps]

    @property
    def positions(self) -> Tensor:
        """(running rows,) position ids of the token drawn last."""
        return self._next_positions[self._running_on_device] + (self.steps - 1)

    def prompt_rows(self) -> Tensor:
        """(running rows,) the prompt of each: before the first token, its prompt's logits draw for every
        response.
        """
        return self._prompt_of_row.to(self._device)

    def record(self, token_ids: Tensor, logprobs: Tensor) -> Tensor:
        """Takes what was drawn for the running rows; returns it for the rows that run on, after dropping
        others.

        token_ids, logprobs: (running rows,).
        """
        if self.steps:
            self._responses.advance()
        self.steps += 1
        for row, token, logprob in zip(
            self.running.tolist(), token_ids.tolist(), logprobs.tolist(), strict=True
        ):
            if self._reasons[row] is not None:
                continue
            tokens = self._tokens[row]
            tokens.append(token)
            self._logprobs[row].append(logprob)
            if token == self._eos_id or self._stop.completes(tokens):
                self._reasons[row] = "stop"
                self._left -= 1
            elif self.steps == self._params.max_tokens:
                self._reasons[row] = "length"
                self._left -= 1
        if 0 < self._left <= COMPACT_AT * len(self.running):
            return token_ids[self._compact()]
        return token_ids

    def responses(self) -> list[tuple[Response, ...]]:
        """The groups, in the order of the prompts; every response must have ended."""
        done: list[Response] = []
        for tokens, logprobs, reason in zip(self._tokens, self._logprobs, self._reasons, strict=True):
            assert reason is not None
            done.append(
                Response(torch.tensor(tokens), torch.tensor(logprobs), self._stop.text(tokens), reason)
            )
        size = self._params.group_size
        return [tuple(done[first : first + size]) for first in range(0, len(done), size)]

    def _compact(self) -> Tensor:
        """Drops ended rows, and prompts with none left, from the caches; returns the indices kept, on the
        device.
        """
        kept = torch.tensor([i for i, row in enumerate(self.running.tolist()) if self._reasons[row] is None])
        self.running = self.running[kept]
        self._responses.keep(kept)
        prompts, self._prompt_of_row = self._prompt_of_row[kept].unique(return_inverse=True)
        if len(prompts) < len(self._prompts.lengths):
            self._prompts.keep(prompts)
        self._rebuild()
        return kept.to(self._device)

    def _rebuild(self) -> None:
        self._running_on_device = self.running.to(self._device)
        self._attention = DecodeAttention(self._prompt_of_row, self._prompts, self._responses, self._device)
