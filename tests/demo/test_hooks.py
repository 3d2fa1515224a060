"""Traces in the clock of the prompt, and captions of single frames."""

import numpy as np
import pytest

from megavila.data.row import Row
from megavila.data.synth import Difficulty, make_scene, to_row, trace
from megavila.data.synth.captions import caption, caption_rows
from megavila.data.synth.scene import CATEGORIES
from megavila.demo.hooks import LATEST_START, reasoning, vary


def synthetic_row(category: str, seed: int = 0) -> dict:
    scene = make_scene(category, Difficulty(events=3, decoys=1), np.random.default_rng(seed))
    return to_row(scene, "x", "x.mp4")


def as_row(record: dict, **extra: int) -> Row:
    return Row(problem_id="x", problem=record["problem"], extra={**record, **extra})


@pytest.mark.parametrize("category", CATEGORIES)
def test_reasoning_follows_the_prompts_clock(category: str) -> None:
    record = synthetic_row(category)
    times = np.arange(record["duration"])
    plain = reasoning(as_row(record), times)
    assert plain == trace(record, times)
    later = reasoning(as_row(record, time_offset=7), times)
    assert plain is not None and later is not None
    labels = [
        [int(word[1:]) for word in text.split() if word[0] == "t" and word[1:].isdigit()]
        for text in (plain, later)
    ]
    assert labels[0] and labels[1] == [label + 7 for label in labels[0]]


def test_frames_that_miss_an_event_carry_no_reasoning() -> None:
    record = synthetic_row("Spatial")
    assert reasoning(as_row(record), [0.0, record["duration"] - 1.0]) is None


def test_visits_differ_and_repeat_by_seed() -> None:
    row = as_row(synthetic_row("Plot and Narrative"))
    visits = [vary(row, seed).extra for seed in range(200)]
    assert vary(row, 5).extra == visits[5]
    assert {visit["time_offset"] for visit in visits} == set(range(LATEST_START + 1))
    fewer = [visit["num_frames"] for visit in visits if "num_frames" in visit]
    assert 5 <= len(fewer) <= 45 and all(4 <= n <= row.extra["duration"] for n in fewer)


@pytest.mark.parametrize("category", CATEGORIES)
def test_captions_name_events_without_what_follows_from_them(category: str) -> None:
    record = synthetic_row(category, seed=3)
    quiet = {"nothing", "lamp off"}
    for event in record["events"]:
        middle = (event["start"] + event["end"]) / 2
        said = caption(record, middle)
        assert said == (event["words"].split(" -> ")[0] if event["words"] else said) and said is not None
        if event["kind"] == "decoy":
            assert said in quiet
    rows = caption_rows([record], per_video=6, seed=0)
    assert len({row["problem_id"] for row in rows}) == len(rows) == 6
    for row in rows:
        assert row["num_frames"] == 1 and row["start"] < row["end"]
        assert row["answer"] == f"<answer>{caption(record, row['start'])}</answer>"
    assert any(row["answer"].strip("</answer>") not in quiet for row in rows)
