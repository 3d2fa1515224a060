"""The two attention strategies of the engine: prefill of packed prompts, and decoding of groups over a shared
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megavila_kernels import IntervalMask, attend
from megavila_kernels.shared_prefix_decode import DecodeGroups, shared_prefix_decode
from torch import Tensor

from megavila.rollout.kv_cache import PromptCache, ResponseCache


class PrefillAttention:
    """Causal attention within each prompt of a packed run; leaves every layer's keys and values in the cache.

    ``lengths``: of the packed prompts, which are ``first_prompt`` and those after it in ``cache``.
    """

    def __init__(
        self, lengths: Sequence[int], cache: PromptCache, first_prompt: int, device: torch.device
    ) -> None:
        self._lengths, self._cache, self._first_prompt = lengths, cache, first_prompt
        sizes = torch.tensor(lengths)
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        ends = torch.arange(1, int(sizes.sum()) + 1)
        lo, hi = (bound.to(device, torch.int32)[None] for bound in (starts, ends))
        self._mask = IntervalMask(lo, hi, len(ends))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (t, heads, d), k and v (t, kv_heads, d) -> (t, heads, d)."""
        self._cache.write(layer, self._first_prompt, self._lengths, k, v)
        out, _ = attend(q, k, v, self._mask, scale=scale)
        return out


class DecodeAttention:
    """One token of each response against its group's prompt and against the response itself: one softmax over
    both, in which a prompt's keys and values are read once for the group.

    ``prompt_of_row``: (n,) index into ``prompts``, ascending: the responses of a group are neighbours.
    """

    def __init__(
        self, prompt_of_row: Tensor, prompts: PromptCache, responses: ResponseCache, device: torch.device
    ) -> None:
        self._prompts, self._responses = prompts, responses
        self._groups = DecodeGroups(prompt_of_row, prompts.lengths, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (n, heads, d), k and v (n, kv_heads, d), one token of each response -> (n, heads, d)."""
        own = self._responses.append(layer, k, v)
        return shared_prefix_decode(q, *self._prompts.read(layer), *own, self._groups, scale=scale)
