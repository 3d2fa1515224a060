"""Ring attention over any degree against dense attention over the whole layout, gradients included."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megavila_kernels.interval_attention import finish, get_backend
from megavila_kernels.interval_attention.reference import reference_attend
from torch import Tensor

from megavila.mrsp.layout import LAYOUT_KINDS, Group, Layout, LayoutKind, build_layout
from megavila.mrsp.ring import RingAttention
from megavila.mrsp.sharding import shard_layout
from megavila.runtime.errors import MegavilaError
from tests.mrsp.threads import ThreadGroup, Wire, run_threads

Make = Callable[..., Any]
HEADS, KV_HEADS, D = 4, 2, 16

# Per group: text, frames of each video (3 tokens each), text, response lengths.
SHAPES: dict[str, list[tuple[int, list[int], int, list[int]]]] = {
    "one token": [(1, [], 0, [1])],
    "uneven": [(length - 2, [], 0, [2]) for length in (9, 8, 8, 12, 8, 12)],
    "odd": [(7, [3], 4, [1, 9, 33, 2, 7])],
    "mixed": [(5, [2, 1], 4, [7, 0, 1]), (9, [], 0, [3, 5]), (0, [1], 1, []), (31, [16], 2, [63, 17])],
}


def layout_of(name: str, kind: LayoutKind, make_prompt: Make, make_responses: Make) -> Layout:
    groups = [
        Group(make_prompt(before, videos, after, seed=number), make_responses(responses, number))
        for number, (before, videos, after, responses) in enumerate(SHAPES[name])
    ]
    return build_layout(groups, kind)


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v and the upstream gradient, fp64; keys far from zero make the softmax uneven."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(tokens, HEADS, D), (tokens, KV_HEADS, D), (tokens, KV_HEADS, D), (tokens, HEADS, D)]
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [q, 2 * k + 0.5, v, dout]


def dense(layout: Layout, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, _ = reference_attend(q, k, v, layout.mask, D**-0.5)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def on_a_ring(layout: Layout, size: int, tensors: list[Tensor], *, padding: int = 0) -> list[Tensor]:
    """out, dq, dk, dv of the whole layout, computed by `size` ranks with so many rows of garbage behind."""
    wire = Wire(size)
    results = [torch.full_like(x, float("nan")) for x in (tensors[0], *tensors[:3])]

    def rank_main(rank: int) -> None:
        sharding = shard_layout(layout, size, rank)
        own = sharding.tokens[rank]
        masks = [sharding.mask(own, block) for block in sharding.tokens]
        ring = RingAttention(ThreadGroup(wire, rank), masks, [len(block) for block in sharding.tokens])
        for _ in range(2):  # a second layer finds buffers that have been written to
            q, k, v, dout = (
                torch.cat([x[own], torch.full((padding, *x.shape[1:]), 7.0, dtype=x.dtype)]) for x in tensors
            )
            for x in (q, k, v):
                x.requires_grad_()
            out = ring(0, q, k, v, D**-0.5)
            grads = torch.autograd.grad(out, (q, k, v), dout)
        for result, part in zip(results, (out.detach(), *grads), strict=True):
            result[own] = part[: len(own)]
            assert torch.equal(part[len(own) :], torch.zeros_like(part[len(own) :]))

    run_threads(rank_main, size)
    return results


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_dense_attention(
    name: str, kind: LayoutKind, size: int, make_prompt: Make, make_responses: Make
) -> None:
    layout = layout_of(name, kind, make_prompt, make_responses)
    tensors = inputs(layout.num_tokens)
    for actual, expected in zip(
        on_a_ring(layout, size, tensors, padding=3), dense(layout, *tensors), strict=True
    ):
        # With a single visible key the gradients of q and k are zero but for rounding.
        scale = expected.norm().clamp_min(1e-3)
        assert (actual - expected).norm() <= 1e-12 * scale


def test_error_in_bf16_does_not_grow_with_the_ring(make_prompt: Make, make_responses: Make) -> None:
    layout = build_layout([Group(make_prompt(300, [20], 80, seed=1), make_responses([63, 97, 41], 1))])
    tensors = [x.bfloat16() for x in inputs(layout.num_tokens)]
    exact = dense(layout, *(x.double() for x in tensors))
    alone = [error(*pair) for pair in zip(on_a_ring(layout, 1, tensors), exact, strict=True)]
    assert all(1e-4 < e < 1e-2 for e in alone)  # rounding of the results to bf16, and nothing else
    for size in (2, 4, 8):
        errors = [error(*pair) for pair in zip(on_a_ring(layout, size, tensors), exact, strict=True)]
        for name, ours, single in zip(("out", "dq", "dk", "dv"), errors, alone, strict=True):
            assert ours < 1.02 * single, (size, name, ours, single)


def test_bf16_partial_results_would_fail_that(make_prompt: Make, make_responses: Make) -> None:
    """What the test above guards against: the state rounded between the steps."""
    layout = build_layout([Group(make_prompt(300, [20], 80, seed=1), make_responses([63, 97, 41], 1))])
    q, k, v, dout = (x.bfloat16() for x in inputs(layout.num_tokens))
    exact = dense(layout, *(x.double() for x in (q, k, v, dout)))[0]
    sharding = shard_layout(layout, 8)
    everything = torch.arange(layout.num_tokens)

    def forward(rounded: bool) -> float:
        backend, state = get_backend("torch", q), None
        for block in sharding.tokens:
            mask = sharding.mask(everything, block)
            assert mask is not None
            state = backend.accumulate(q, k[block], v[block], mask, D**-0.5, state)
            if rounded:
                state = replace(state, acc=state.acc.bfloat16().float())
        assert state is not None
        return error(finish(state, q.dtype)[0], exact)

    assert forward(rounded=True) > 1.1 * forward(rounded=False)


def test_what_nobody_sees_is_not_computed(make_prompt: Make, make_responses: Make) -> None:
    """Packed groups on 8 ranks: a block of another group's tokens has no mask, and no attention is run."""
    groups = [Group(make_prompt(1, [], 0, seed=n), make_responses([1], n)) for n in range(2)]
    sharding = shard_layout(build_layout(groups), 8)
    seen = [
        [sharding.mask(queries, keys) is not None for keys in sharding.tokens] for queries in sharding.tokens
    ]
    assert sum(map(sum, seen)) == sum(
        bool(sharding.layout.mask.visible()[queries][:, keys].any())
        for queries in sharding.tokens
        for keys in sharding.tokens
    )
    assert sum(map(sum, seen)) < 64


def test_the_reference_backend_is_refused() -> None:
    with pytest.raises(MegavilaError, match="no backend 'reference'; use model.attention_backend auto"):
        RingAttention(ThreadGroup(Wire(2), 0), [None, None], [0, 0], "reference")
