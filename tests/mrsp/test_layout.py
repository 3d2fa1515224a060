"""Layouts against a token-by-token account written here, and the exactness of what they name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megavila.mrsp.layout import Group, LayoutKind, build_layout, pack_groups
from megavila.runtime.errors import MegavilaError

Make = Callable[..., Any]


@pytest.fixture
def groups(make_prompt: Make, make_responses: Make) -> list[Group]:
    """Two videos, text only, one video of one frame; odd lengths, an empty response, no response at all."""
    return [
        Group(make_prompt(5, [2, 1], 4, seed=1), make_responses([7, 0, 1], 1)),
        Group(make_prompt(9, [], 0, seed=2), make_responses([3, 5], 2)),
        Group(make_prompt(0, [1], 1, seed=3), make_responses([], 3)),
        Group(make_prompt(1, [1], 2, seed=4), make_responses([11], 4)),
    ]


def account(groups: list[Group], kind: LayoutKind) -> list[dict[str, Any]]:
    """Each token of the layout as a record, in order."""
    records: list[dict[str, Any]] = []
    media = 0
    for number, group in enumerate(groups):
        prompt = group.prompt
        copies = [0] if kind == "shared_prefix" else range(len(group.responses))
        sequences = [(copy, [copy] if kind == "repeated" else range(len(group.responses))) for copy in copies]
        for copy, members in sequences:
            for i in range(len(prompt.token_ids)):
                index = int(prompt.media_index[i])
                records.append(
                    {
                        "id": (number, copy, None, i),
                        "token": int(prompt.token_ids[i]),
                        "position": prompt.position_ids[..., i].tolist(),
                        "media": index if index < 0 else index + media,
                    }
                )
            for member in members:
                for j, token in enumerate(group.responses[member].tolist()):
                    records.append(
                        {
                            "id": (number, copy, member, j),
                            "token": token,
                            "position": prompt.next_position + j,
                            "media": -1,
                        }
                    )
        media += prompt.num_media_rows
    return records


def sees(query: dict[str, Any], key: dict[str, Any]) -> bool:
    group, copy, member, i = query["id"]
    key_group, key_copy, key_member, j = key["id"]
    if (group, copy) != (key_group, key_copy):
        return False
    if member == key_member:
        return j <= i
    return key_member is None


@pytest.mark.parametrize("kind", ["shared_prefix", "repeated"])
def test_every_token_is_accounted_for(groups: list[Group], kind: LayoutKind) -> None:
    layout = build_layout(groups, kind)
    records = account(groups, kind)
    assert layout.token_ids.tolist() == [r["token"] for r in records]
    assert layout.position_ids.tolist() == [r["position"] for r in records]
    assert layout.media_index.tolist() == [r["media"] for r in records]
    visible = torch.tensor([[sees(query, key) for key in records] for query in records])
    assert torch.equal(layout.mask.visible(), visible)
    assert layout.num_tokens == sum(group.tokens(kind) for group in groups)
    assert layout.num_media_rows == sum(group.prompt.num_media_rows for group in groups)


@pytest.mark.parametrize("kind", ["shared_prefix", "repeated"])
def test_predictors_are_the_tokens_before(groups: list[Group], kind: LayoutKind) -> None:
    layout = build_layout(groups, kind)
    records = account(groups, kind)
    expected = []
    response_number = 0
    for number, group in enumerate(groups):
        for member, response in enumerate(group.responses):
            copy = member if kind == "repeated" else 0
            for j, token in enumerate(response.tolist()):
                before = (number, copy, member, j - 1) if j else (number, copy, None, group.prompt_tokens - 1)
                expected.append((before, token, number, response_number))
            response_number += 1
    rows = layout.predictor_rows.tolist()
    assert [records[row]["id"] for row in rows] == [e[0] for e in expected]
    assert layout.targets.tolist() == [e[1] for e in expected]
    assert layout.group_of_target.tolist() == [e[2] for e in expected]
    assert layout.response_of_target.tolist() == [e[3] for e in expected]
    assert layout.response_lengths.tolist() == [7, 0, 1, 3, 5, 11]
    assert (layout.num_groups, layout.num_responses, layout.num_targets) == (4, 6, 27)


def test_three_axes_reach_responses_and_text_only_prompts(make_prompt: Make, make_responses: Make) -> None:
    video = make_prompt(2, [2], 3, seed=1, axes=3)
    text = make_prompt(4, [], 0, seed=2, axes=1)
    layout = build_layout([Group(video, make_responses([2], 1)), Group(text, make_responses([1], 2))])
    assert layout.position_ids.shape == (3, layout.num_tokens)
    # 2 text tokens, 2 frames of 3 tokens at positions 2..4 of the widest axis, text from 5 on.
    assert layout.position_ids[0].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert layout.position_ids[1].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_prints_who_holds_which_tokens(groups: list[Group]) -> None:
    lines = str(build_layout(groups)).splitlines()
    assert lines[0] == (
        "shared_prefix layout: 4 groups, 6 responses, 64 tokens (37 prompt, 27 response), 27 targets, 15 media rows"
    )
    assert lines[3].split() == "0 response 0 7 18-24 18 tokens 0-17 and itself up to each token".split()
    assert lines[4].split()[:5] == ["0", "response", "1", "0", "none"]


def test_packing_keeps_order_and_drops_nothing(groups: list[Group]) -> None:
    sizes = [group.tokens("shared_prefix") for group in groups]
    assert sizes == [26, 17, 4, 17]  # three frames of three tokens among the first group's prompt
    batches = pack_groups(groups, max_tokens=30)
    assert [group for batch in batches for group in batch] == groups
    assert [len(batch) for batch in batches] == [1, 2, 1]
    assert len(pack_groups(groups, max_tokens=sum(sizes))) == 1
    assert pack_groups(groups, max_tokens=26)[0] == groups[:1]
    with pytest.raises(
        MegavilaError, match=r"group 0 \(problem row1\) has 26 tokens .* may hold 25; .* at least 26"
    ):
        pack_groups(groups, max_tokens=25)


def test_mistakes_are_named(make_prompt: Make, make_responses: Make) -> None:
    responses = make_responses([1], 1)
    with pytest.raises(MegavilaError, match="unknown layout 'shared'"):
        build_layout([Group(make_prompt(1, [], 0, seed=1), responses)], "shared")  # type: ignore[arg-type]
    with pytest.raises(MegavilaError, match="at least one group"):
        build_layout([])
    with pytest.raises(MegavilaError, match="0 tokens"):
        build_layout([Group(make_prompt(0, [], 0, seed=1), responses)])
    wrong = make_prompt(1, [2], 0, seed=1)
    wrong.num_media_rows = 5
    with pytest.raises(MegavilaError, match="names media row 5, but its videos have 5 rows"):
        build_layout([Group(wrong, responses)])
