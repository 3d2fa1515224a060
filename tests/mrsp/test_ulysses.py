"""Ulysses and hybrid attention against dense attention over the whole layout, for any heads and degrees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megavila.mrsp.attention import LocalAttention
from megavila.mrsp.layout import LAYOUT_KINDS, Group, Layout, LayoutKind, build_layout
from megavila.mrsp.ring import RingAttention
from megavila.mrsp.sharding import shard_layout
from megavila.mrsp.ulysses import UlyssesAttention, split_heads
from megavila.runtime.errors import MegavilaError
from tests.mrsp.threads import ThreadGroup, Wire, run_threads

Make = Callable[..., Any]
D = 8


def mixed(kind: LayoutKind, make_prompt: Make, make_responses: Make) -> Layout:
    groups = [
        Group(make_prompt(5, [2, 1], 4, seed=1), make_responses([7, 0, 1], 1)),
        Group(make_prompt(9, [], 0, seed=2), make_responses([3, 5], 2)),
        Group(make_prompt(3, [4], 1, seed=3), make_responses([13, 9], 3)),
    ]
    return build_layout(groups, kind)


def inputs(tokens: int, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(tokens, h, D) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def dense(layout: Layout, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """With torch's own attention."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=layout.mask.visible(), enable_gqa=True
    )[0].transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def hybrid(
    layout: Layout, ulysses: int, ring: int, tensors: list[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """out, dq, dk, dv of the whole layout, and what each rank sent to its Ulysses group."""
    size = ulysses * ring
    rows = [Wire(ulysses) for _ in range(ring)]
    columns = [Wire(ring) for _ in range(ulysses)]
    results = [torch.full_like(x, float("nan")) for x in (tensors[0], *tensors[:3])]

    def rank_main(rank: int) -> list[Tensor]:
        sharding = shard_layout(layout, size, rank, tensor=2)
        here, place = divmod(rank, ulysses)
        members = [range(first, first + ulysses) for first in range(0, size, ulysses)]
        blocks = [torch.cat([sharding.tokens[r] for r in group]).sort().values for group in members]
        masks = [sharding.mask(blocks[here], block) for block in blocks]
        inner = (
            LocalAttention(layout.mask)
            if ring == 1
            else RingAttention(ThreadGroup(columns[place], here), masks, [len(block) for block in blocks])
        )
        group = ThreadGroup(rows[here], place)
        padded = [sharding.padded_tokens(r) for r in members[here]]
        attention = UlyssesAttention(group, padded, inner, torch.device("cpu"))
        own, count = sharding.padded_tokens(), len(sharding.tokens[rank])
        # Garbage in the padding must reach nobody.
        q, k, v, dout = (torch.where((own < 0)[:, None, None], 7.0, x[own.clamp(min=0)]) for x in tensors)
        for x in (q, k, v):
            x.requires_grad_()
        out = attention(0, q, k, v, D**-0.5)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        for result, part in zip(results, (out.detach(), *grads), strict=True):
            result[own[:count]] = part[:count]
            assert torch.equal(part[count:], torch.zeros_like(part[count:]))
        return group.sent

    return results, run_threads(rank_main, size)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ulysses", "ring"),
    [
        (4, 4, 2, 1),
        (4, 2, 4, 1),  # more ranks than key/value heads
        (28, 4, 4, 2),
        (28, 4, 7, 1),  # ranks begin in the middle of a key/value head's queries
        (12, 6, 4, 1),
        (6, 1, 3, 2),
        (4, 2, 1, 3),
        (8, 8, 2, 4),
    ],
)
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_equals_dense_attention(
    kind: LayoutKind,
    heads: int,
    kv_heads: int,
    ulysses: int,
    ring: int,
    make_prompt: Make,
    make_responses: Make,
) -> None:
    layout = mixed(kind, make_prompt, make_responses)
    tensors = inputs(layout.num_tokens, heads, kv_heads)
    actual, _ = hybrid(layout, ulysses, ring, tensors)
    for ours, theirs in zip(actual, dense(layout, *tensors), strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ulysses", "kv_per_rank"), [(8, 4, 2, 2), (8, 4, 4, 1), (8, 2, 4, 1), (8, 2, 8, 1)]
)
def test_heads_are_copied_no_more_than_needed(
    heads: int, kv_heads: int, ulysses: int, kv_per_rank: int, make_prompt: Make, make_responses: Make
) -> None:
    """One all-to-all carries q, k and v, one brings the output back, and as many for the gradients."""
    layout = mixed("shared_prefix", make_prompt, make_responses)
    _, sent = hybrid(layout, ulysses, 1, inputs(layout.num_tokens, heads, kv_heads))
    rows = shard_layout(layout, ulysses, tensor=2).rows
    there, back = heads // ulysses + 2 * kv_per_rank, heads // ulysses
    for messages in sent:
        shapes = [tuple(message.shape) for message in messages]
        assert shapes == [(ulysses, rows, h, D) for h in (there, back, back, there)]


def test_heads_that_do_not_divide_are_named() -> None:
    with pytest.raises(
        MegavilaError, match=r"28 heads .* Ulysses degree 8; use parallel.cp_ulysses in \[1, 2, 4"
    ):
        split_heads(28, 4, 8)
