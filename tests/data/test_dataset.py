"""The order of rows, resuming, and what happens to rows whose media are bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megavila.config import DataConfig
from megavila.data import (
    GroupSampler,
    PromptBuilder,
    PromptStream,
    PromptTemplate,
    Row,
    build_word_tokenizer,
    load_tokenizer,
    target_text,
)
from megavila.media import MediaError
from megavila.runtime.errors import MegavilaError

ROWS = [Row(str(i), f"question {i}") for i in range(7)]
PINNED = ["6", "5", "0", "2", "3", "4", "1"]


def names(rows: list[Row]) -> list[str]:
    return [row.problem_id for row in rows]


def test_epochs_are_permutations() -> None:
    sampler = GroupSampler(ROWS, seed=3)
    epochs = [names(sampler.next(7)) for _ in range(4)]
    assert all(sorted(epoch) == names(ROWS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sampler.epoch == 4.0
    assert names(GroupSampler(ROWS, seed=4).next(7)) != epochs[0]
    assert names(GroupSampler(ROWS, seed=3, shuffle=False).next(9)) == [*names(ROWS), "0", "1"]


def test_order_does_not_depend_on_batch_size() -> None:
    expected = names(GroupSampler(ROWS, seed=3).next(30))
    for size in (1, 2, 5, 10):
        sampler = GroupSampler(ROWS, seed=3)
        assert [name for _ in range(30 // size) for name in names(sampler.next(size))] == expected


def test_order_is_pinned() -> None:
    """Runs resumed with a later version must go on in the same order."""
    assert names(GroupSampler(ROWS, seed=0).next(7)) == PINNED


def test_resume_anywhere() -> None:
    expected = names(GroupSampler(ROWS, seed=3).next(25))
    for drawn in range(20):
        sampler = GroupSampler(ROWS, seed=3)
        sampler.next(drawn)
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = GroupSampler(ROWS, seed=3)
        resumed.load_state_dict(state)
        assert names(resumed.next(25 - drawn)) == expected[drawn:]


def test_resume_with_other_rows_is_refused() -> None:
    state = GroupSampler(ROWS, seed=3).state_dict()
    with pytest.raises(MegavilaError, match="data.train.*7 rows.*6 rows"):
        GroupSampler(ROWS[:6], seed=3).load_state_dict(state)
    with pytest.raises(MegavilaError, match="the seed changed from 3 to 4"):
        GroupSampler(ROWS, seed=4).load_state_dict(state)
    with pytest.raises(MegavilaError, match="no rows"):
        GroupSampler([], seed=3)


@pytest.fixture
def stream_of(tmp_path: Path):
    tokenizer = load_tokenizer(build_word_tokenizer(["question"], tmp_path / "words"))
    Image.new("RGB", (32, 16), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").touch()

    def make(kinds: str, on_bad_media: str) -> PromptStream:
        """`kinds`: one letter a row, g for a readable picture and b for a bad one."""
        files = {"g": "good.png", "b": "bad.png"}
        rows = [
            Row(str(i), "question", data_type="image", videos=(str(tmp_path / files[kind]),))
            for i, kind in enumerate(kinds)
        ]
        config = DataConfig(num_frames=1, on_bad_media=on_bad_media)
        builder = PromptBuilder(tokenizer, PromptTemplate("plain"), config, 2)
        return PromptStream(GroupSampler(rows, seed=0, shuffle=False), builder)

    return make


def test_bad_media_stop_the_run_or_are_counted(stream_of) -> None:
    with pytest.raises(MediaError, match="bad.png: the file is empty"):
        stream_of("gbg", "error").next(3)
    stream = stream_of("gbgbb", "skip")
    prompts = stream.next(4)
    assert names([prompt.row for prompt in prompts]) == ["0", "2", "0", "2"]
    assert all(prompt.num_media_rows == 2 for prompt in prompts)
    assert stream.failed == 4
    resumed = stream_of("gbgbb", "skip")
    resumed.load_state_dict(stream.state_dict())
    assert resumed.failed == 4
    assert names([p.row for p in resumed.next(3)]) == names([p.row for p in stream.next(3)])
    with pytest.raises(MegavilaError, match="any of 3 rows"):
        stream_of("bbb", "skip").next(1)


def test_targets() -> None:
    def target(reasoning: str, **settings) -> str | None:
        return target_text(Row("1", "?", reasoning=reasoning, answer="B"), (0.0, 2.5), **settings)

    assert target(" It moved. ") == "<think> It moved. </think> <answer>B</answer>"
    assert target("<think>It moved.</think>") == "<think>It moved.</think> <answer>B</answer>"
    assert target("<think>a</think>\n<answer>B</answer>") == "<think>a</think>\n<answer>B</answer>"
    assert target("It moved.", think=False) == "<think> </think> <answer>B</answer>"
    assert target("x", rewrite=lambda row, times: f"{row.answer} at {times[1]}") == (
        "<think> B at 2.5 </think> <answer>B</answer>"
    )
    assert target("x", rewrite=lambda row, times: None) is None
    with pytest.raises(MegavilaError, match="no reasoning"):
        target(" ")
