"""The two attention strategies of the engine: prefill of packed prompts, and decoding of groups over a shared
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megavila_kernels import IntervalMask, attend
from torch import Tensor

from megavila.rollout.kv_cache import PromptCache, ResponseCache, cache_dtype

LOG2E = math.log2(math.e)


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
    both.

    The two parts are computed apart, each as (maximum, sum, weighted values), and joined exactly. The prompt
    part is one matrix product per prompt and K/V head: the queries of all G responses of a group stand side
    by side in it, so the prompt's keys and values are read once for the group.

    ``prompt_of_row``: (n,) index into ``prompts``, ascending: the responses of a group are neighbours.
    """

    def __init__(
        self, prompt_of_row: Tensor, prompts: PromptCache, responses: ResponseCache, device: torch.device
    ):
        self._prompts, self._responses = prompts, responses
        lengths = prompts.lengths
        self._groups = len(lengths)
        rows_of_group = torch.bincount(prompt_of_row, minlength=self._groups)
        self._width = int(rows_of_group.max())
        # Groups of unequal size are padded to the widest; a slot is a row's place in that rectangle.
        self._slots: Tensor | None = None
        if int(rows_of_group.min()) < self._width:
            first = rows_of_group.cumsum(0) - rows_of_group
            place = torch.arange(len(prompt_of_row)) - first[prompt_of_row]
            self._slots = (prompt_of_row * self._width + place).to(device)
        longest = int(lengths.max())
        self._padding: Tensor | None = None
        if int(lengths.min()) < longest:
            beyond = torch.arange(longest) >= lengths[:, None]
            self._padding = (
                torch.zeros(beyond.shape).masked_fill_(beyond, float("-inf")).to(device)[:, None, None]
            )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (n, heads, d), k and v (n, kv_heads, d), one token of each response -> (n, heads, d)."""
        rows, heads, d = q.shape
        kv_heads = k.shape[1]
        shared = heads // kv_heads
        queries = q.to(cache_dtype(q)) * (scale * LOG2E)

        keys, values = self._responses.append(layer, k, v)
        own = _partial(
            queries.view(rows * kv_heads, shared, d),
            keys.flatten(0, 1).transpose(1, 2),
            values.flatten(0, 1),
            padding=None,
        )
        own = tuple(part.view(rows, heads, -1) for part in own)

        keys, values = self._prompts.read(layer)
        groups, width = self._groups, self._width
        if self._slots is not None:
            queries = queries.new_zeros(groups * width, heads, d).index_copy_(0, self._slots, queries)
        queries = queries.view(groups, width, kv_heads, shared, d).transpose(1, 2)
        prompt = _partial(
            queries.reshape(groups * kv_heads, width * shared, d),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self._padding,
        )
        prompt = tuple(
            part.view(groups, kv_heads, width, shared, -1).transpose(1, 2).reshape(groups * width, heads, -1)
            for part in prompt
        )
        if self._slots is not None:
            prompt = tuple(part[self._slots] for part in prompt)
        return _join(prompt, own).to(q.dtype)


def _partial(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention of one part: maximum (b, m, 1), sum (b, m, 1) and weighted values (b, m, d).

    q (b, m, d) with scale and log2(e) in it, k (b, d, keys), v (b, keys, d); the exponential is base 2, which
    is fast for any argument on a CPU. ``padding`` (groups, 1, 1, keys): −inf where a prompt has ended.
    """
    scores = _product(q, k)
    if padding is not None:
        groups = padding.shape[0]
        scores.view(groups, -1, *scores.shape[1:]).add_(padding)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp2_()
    return top, weights.sum(dim=-1, keepdim=True), _product(weights.to(v.dtype), v)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product in fp32 (fp64) whatever the inputs' type."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32)


def _join(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """Attention over the keys of both parts: (n, heads, d)."""
    top = torch.maximum(a[0], b[0])
    weight_a, weight_b = (a[0] - top).exp2_(), (b[0] - top).exp2_()
    total = (a[1] * weight_a).addcmul_(b[1], weight_b)
    return (a[2] * weight_a).addcmul_(b[2], weight_b).div_(total)
