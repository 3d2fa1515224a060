"""Shards hold every token once, see what the layout says and predict every target, for any sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megavila.mrsp.layout import LAYOUT_KINDS, Group, Layout, LayoutKind, build_layout
from megavila.mrsp.sharding import PADDING, shard_layout
from megavila.runtime.errors import MegavilaError

Make = Callable[..., Any]

# Per group: text before the videos, frames of each video (3 tokens each), text after, response lengths.
SHAPES: dict[str, list[tuple[int, list[int], int, list[int]]]] = {
    "one token": [(1, [], 0, [1])],
    "no responses": [(0, [1], 2, []), (1, [], 0, [0, 1])],
    "prompt shorter than the chunks": [(2, [1], 0, [5, 0, 13])],
    "even": [(8, [8], 0, [16, 16])],
    "odd": [(7, [3], 4, [1, 9, 33, 2, 7])],
    "mixed": [
        (5, [2, 1], 4, [7, 0, 1]),
        (9, [], 0, [3, 5]),
        (0, [1], 1, []),
        (1, [1], 2, [11]),
        (3, [], 0, [0]),
    ],
    "long": [(31, [16, 21], 40, [63, 17, 97, 1])],
}
RANKS = (1, 2, 3, 4, 8)


def layout_of(name: str, kind: LayoutKind, make_prompt: Make, make_responses: Make) -> Layout:
    groups = [
        Group(make_prompt(before, videos, after, seed=number), make_responses(responses, number))
        for number, (before, videos, after, responses) in enumerate(SHAPES[name])
    ]
    return build_layout(groups, kind)


@pytest.fixture(params=[(name, kind) for name in SHAPES for kind in LAYOUT_KINDS], ids=str)
def layout(request: pytest.FixtureRequest, make_prompt: Make, make_responses: Make) -> Layout:
    return layout_of(*request.param, make_prompt, make_responses)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_token_target_and_media_row_has_its_place(layout: Layout, ranks: int) -> None:
    sharding = shard_layout(layout, ranks, tensor=2)
    assert sharding.rows % 2 == 0 and sharding.rows > 0
    assert torch.cat(sharding.tokens).sort().values.tolist() == list(range(layout.num_tokens))
    predicted = []
    for rank in range(ranks):
        tokens = sharding.padded_tokens(rank)
        real = tokens[tokens != PADDING]
        assert len(tokens) == sharding.rows and torch.equal(tokens[: len(real)], real)
        assert torch.equal(real, real.unique(sorted=True))
        targets, rows = sharding.targets_of(rank)
        assert torch.equal(tokens[rows], layout.predictor_rows[targets])
        predicted += targets.tolist()
        media = {int(layout.media_index[token]) for token in real} - {-1}
        assert sharding.media_rows_of(rank).tolist() == sorted(media)
    assert sorted(predicted) == list(range(layout.num_targets))


@pytest.mark.parametrize("ranks", RANKS)
def test_masks_of_blocks_are_the_layouts(layout: Layout, ranks: int) -> None:
    visible = layout.mask.visible()
    sharding = shard_layout(layout, ranks)
    for queries in sharding.tokens:
        for keys in sharding.tokens:
            expected = visible[queries][:, keys]
            mask = sharding.mask(queries, keys)
            if mask is None:
                assert not expected.any()
            else:
                assert torch.equal(mask.visible(), expected) and expected.any()


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_tokens_and_work_are_balanced(
    ranks: int, kind: LayoutKind, make_prompt: Make, make_responses: Make
) -> None:
    layout = layout_of("long", kind, make_prompt, make_responses)
    sharding = shard_layout(layout, ranks)
    sizes = [len(tokens) for tokens in sharding.tokens]
    runs = (
        sum(s.response is None for s in layout.segments) * 2 + 1
    )  # two chunks a prompt, one part of responses
    assert max(sizes) - min(sizes) <= runs
    work = [float(layout.mask.visible()[tokens].sum()) for tokens in sharding.tokens]
    assert max(work) < 1.15 * sum(work) / ranks


def test_prompts_lie_zigzag_and_responses_in_order(make_prompt: Make, make_responses: Make) -> None:
    layout = build_layout([Group(make_prompt(8, [8], 0, seed=1), make_responses([6, 10], 1))])
    held = [tokens.tolist() for tokens in shard_layout(layout, 4).tokens]
    assert held[0] == [*range(0, 4), *range(28, 32), *range(32, 36)]
    assert held[3] == [*range(12, 20), *range(44, 48)]


def test_prints_who_holds_what(make_prompt: Make, make_responses: Make) -> None:
    layout = build_layout([Group(make_prompt(2, [2], 1, seed=1), make_responses([3, 2], 1))])
    lines = str(shard_layout(layout, 2, tensor=4)).splitlines()
    assert lines[0] == "14 tokens in 2 shards of 8 rows"
    # A prompt of 9 in chunks of 3, 2, 2, 2; responses of 5 in parts of 3 and 2.
    assert lines[2].split() == "0 8 0 4 2 56 0-2, 7-11".split()
    assert lines[3].split() == "1 6 2 1 4 43 3-6, 12-13".split()


def test_a_rank_beyond_the_degree_is_refused(make_prompt: Make, make_responses: Make) -> None:
    layout = build_layout([Group(make_prompt(1, [], 0, seed=1), make_responses([1], 1))])
    with pytest.raises(MegavilaError, match="context rank 2 is not among 2 ranks; use 0 to 1"):
        shard_layout(layout, 2, 2)


def groups_of(tokens: list[int], make_prompt: Make, make_responses: Make) -> list[Group]:
    """One group of each size, half of it prompt."""
    return [
        Group(make_prompt(size - size // 2, [], 0, seed=number), make_responses([size // 2], number))
        for number, size in enumerate(tokens)
    ]


@pytest.mark.parametrize(
    ("tokens", "ranks", "whole"),
    [
        ([1000, 1000], 2, True),
        ([1000, 990, 2000, 2010], 2, True),
        ([2000, 1000, 1000], 2, False),  # even in tokens, but not in what attention computes
        ([2000], 2, False),
        ([1000, 1000, 1000], 2, False),
        ([300, 200], 4, True),  # too short to be worth sending
        ([1], 4, True),
    ],
)
def test_groups_stay_whole_where_no_rank_waits_for_it(
    tokens: list[int], ranks: int, whole: bool, make_prompt: Make, make_responses: Make
) -> None:
    layout = build_layout(groups_of(tokens, make_prompt, make_responses))
    sharding = shard_layout(layout, ranks, split_always=False)
    assert sharding.split is not whole
    if not whole:
        always = shard_layout(layout, ranks)
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(sharding.tokens, always.tokens, strict=True)
        )
        return
    assert torch.cat(sharding.tokens).sort().values.tolist() == list(range(layout.num_tokens))
    for rank, queries in enumerate(sharding.tokens):
        for other, keys in enumerate(sharding.tokens):
            assert rank == other or sharding.mask(queries, keys) is None
    if layout.num_tokens > 330 * ranks:
        assert max(map(len, sharding.tokens)) <= 1.1 * layout.num_tokens / ranks


def test_one_rank_splits_nothing(make_prompt: Make, make_responses: Make) -> None:
    layout = build_layout(groups_of([5, 7], make_prompt, make_responses))
    assert not shard_layout(layout).split
