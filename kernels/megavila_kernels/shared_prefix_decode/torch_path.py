"""Shared-prefix decoding in plain torch: the CPU path, and the fallback where no Triton kernel runs.

The prompt part and each row's own part are computed apart, each as (maximum, sum, weighted values), and joined
exactly. The prompt part is one matrix product per prompt and K/V head: the queries of all rows of a group
stand side by side in it, so the prompt's keys and values are read once for the group.
"""

import math

import torch
from torch import Tensor

from megavila_kernels.shared_prefix_decode.groups import DecodeGroups

LOG2E = math.log2(math.e)


def torch_shared_prefix_decode(
    q: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    groups: DecodeGroups,
    scale: float,
) -> Tensor:
    """See `shared_prefix_decode`."""
    rows, heads, d = q.shape
    kv_heads = own_keys.shape[1]
    shared = heads // kv_heads
    queries = q.to(own_keys.dtype) * (scale * LOG2E)
    own = _partial(
        queries.view(rows * kv_heads, shared, d),
        own_keys.flatten(0, 1).mT,
        own_values.flatten(0, 1),
        padding=None,
    )
    own = tuple(part.view(rows, heads, -1) for part in own)

    count, width = groups.num_groups, groups.widest
    if groups.slots is not None:
        queries = queries.new_zeros(count * width, heads, d).index_copy_(0, groups.slots, queries)
    queries = queries.view(count, width, kv_heads, shared, d).transpose(1, 2)
    prompt = _partial(
        queries.reshape(count * kv_heads, width * shared, d),
        prompt_keys[:, :, : groups.longest].flatten(0, 1).mT,
        prompt_values[:, :, : groups.longest].flatten(0, 1),
        groups.padding,
    )
    prompt = tuple(
        part.view(count, kv_heads, width, shared, -1).transpose(1, 2).reshape(count * width, heads, -1)
        for part in prompt
    )
    if groups.slots is not None:
        prompt = tuple(part[groups.slots] for part in prompt)
    return _join(prompt, own).to(q.dtype)


def _partial(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention of one part: maximum (b, m, 1), sum (b, m, 1) and weighted values (b, m, d).

    q (b, m, d) with scale and log2(e) in it, k (b, d, keys), v (b, keys, d); the exponential is base 2, which
    is fast for any argument on a CPU. `padding` (groups, 1, 1, keys): -inf where a prompt has ended.
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
