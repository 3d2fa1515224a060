"""Rows from files: what is accepted, and what a malformed one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megavila.config import DataConfig
from megavila.data import Row, RowError, read_rows
from megavila.data.row import strip_answer_tags

GOOD: dict[str, Any] = {
    "problem_id": 17,
    "problem": "Where is the ball?\nA: left\nB: middle\nC: right",
    "data_type": "video",
    "problem_type": "multiple choice",
    "reasoning": "It moved.",
    "videos": "clips/1.mp4",
    "answer": "<answer>B</answer>",
    "category": "Spatial",
    "difficulty": {"swaps": 3},
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def one(tmp_path: Path, config: DataConfig | None = None, **changes: Any) -> Row:
    record = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return read_rows(write(tmp_path / "rows.jsonl", record), config or DataConfig()).rows[0]


def test_published_fields(tmp_path: Path) -> None:
    row = one(tmp_path)
    assert row.problem_id == "17"
    assert row.question == "Where is the ball?"
    assert [tuple(option) for option in row.options] == [("A", "left"), ("B", "middle"), ("C", "right")]
    assert (row.answer, row.category, row.reasoning) == ("B", "Spatial", "It moved.")
    assert row.videos == (str(tmp_path / "clips/1.mp4"),)
    assert row.extra == {"difficulty": {"swaps": 3}}
    assert row.source == f"{tmp_path / 'rows.jsonl'}:1"


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    records = [GOOD | {"problem_id": str(i), "videos": [f"{i}.mp4", "/abs/b.mp4"]} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    mine = read_rows(tmp_path / "rows.parquet", DataConfig()).rows
    same = read_rows(write(tmp_path / "rows.jsonl", *records), DataConfig()).rows
    assert len(mine) == 5 and mine[4].source.endswith("rows.parquet:5")
    for a, b in zip(mine, same, strict=True):
        assert {**vars(a), "source": ""} == {**vars(b), "source": ""}
    assert mine[2].videos == (str(tmp_path / "2.mp4"), "/abs/b.mp4")


def test_columns_and_media_directory_are_configurable(tmp_path: Path) -> None:
    record = {
        "prompt": GOOD["problem"],
        "solution": "(b)",
        "clip": "x.mp4",
        "id": "r1",
        "kind": "video",
        "area": "Plot",
    }
    config = DataConfig(
        prompt_key="prompt",
        answer_key="solution",
        video_key="clip",
        id_key="id",
        data_type_key="kind",
        category_key="area",
        media_dir="/media",
    )
    row = read_rows(write(tmp_path / "rows.jsonl", record), config).rows[0]
    assert (row.problem_id, row.answer, row.videos, row.category) == ("r1", "B", ("/media/x.mp4",), "Plot")
    assert row.problem_type == "multiple choice" and row.extra == {}


def test_kinds_of_rows(tmp_path: Path) -> None:
    assert one(tmp_path, videos=..., data_type=...).data_type == "text"
    assert one(tmp_path, videos=[], data_type="text").videos == ()
    assert one(tmp_path, data_type=...).data_type == "video"
    assert one(tmp_path, data_type="image").data_type == "image"
    assert one(tmp_path, problem_type="Multiple_Choice").problem_type == "multiple choice"
    assert one(tmp_path, problem_type=..., problem="Why?", answer="It fell.").problem_type == "open-ended"
    assert one(tmp_path, problem_type="numerical", problem="How many?", answer=3).answer == "3"
    assert one(tmp_path, problem_id=...).problem_id == f"{tmp_path / 'rows.jsonl'}:1"
    assert one(tmp_path, reasoning=..., category=None).reasoning == ""


def test_options_in_a_column_of_their_own(tmp_path: Path) -> None:
    row = one(tmp_path, problem="Where?", options=["left", "right"])
    assert row.problem == "Where?\nA: left\nB: right" and row.answer == "B"
    assert (
        one(tmp_path, problem="Where?", options=["A. left", "B. right"]).problem
        == "Where?\nA. left\nB. right"
    )
    assert one(tmp_path, options=["x", "y", "z"]).problem == GOOD["problem"]


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B: middle", "<answer> B. middle </answer>"])
def test_answers(tmp_path: Path, answer: str) -> None:
    assert one(tmp_path, answer=answer).answer == "B"


def test_answer_tags() -> None:
    assert strip_answer_tags(" <answer> a <b> </answer> ") == "a <b>"
    assert strip_answer_tags("see <answer>a</answer>") == "see <answer>a</answer>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "D"}, r":1: field 'answer': 'D' is not one of its options A, B, C"),
        ({"answer": "middle"}, r"field 'answer': 'middle' is not one of its options A, B, C"),
        ({"answer": ...}, r"field 'answer': is missing; the row has 'problem_id', 'problem'"),
        ({"answer": "<answer> </answer>"}, r"field 'answer': is empty"),
        ({"problem": ...}, r"field 'problem': is missing"),
        ({"problem": "  "}, r"field 'problem': is empty"),
        ({"problem": ["a"]}, r"field 'problem': must be text, not list"),
        ({"problem": "Where?"}, r"field 'problem': a multiple choice problem has no options"),
        ({"videos": ...}, r"field 'videos': \[\]: data_type='video' needs at least one path"),
        ({"videos": [1]}, r"field 'videos': must be a path or a list of paths, not \[1\]"),
        ({"videos": {"path": "a"}}, r"field 'videos': must be a path"),
        ({"data_type": "hologram"}, r"field 'data_type': 'hologram' is not one of video, image, text, audio"),
        ({"data_type": "text"}, r"field 'videos': .* needs none"),
        ({"problem": "Where?", "options": "left"}, r"field 'options': 'left' is not a list"),
    ],
)
def test_malformed_rows(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        one(tmp_path, **changes)
    assert str(tmp_path / "rows.jsonl") in str(caught.value)


def test_malformed_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(GOOD),
        "",
        "{not json",
        "[1, 2]",
        json.dumps(GOOD | {"answer": "Z"}),
        json.dumps(GOOD),
    ]
    path.write_bytes("\ufeff".encode() + "\n".join(lines).encode() + b'\n{"problem": "\xff"}\n')
    for bad, message in ((3, "not a line of JSON"),):
        with pytest.raises(RowError, match=rf"rows.jsonl:{bad}: {message}"):
            read_rows(path, DataConfig())
    result = read_rows(path, DataConfig(on_bad_row="skip"))
    assert [row.source.rsplit(":", 1)[1] for row in result.rows] == ["1", "6"]
    assert result.skipped == 4 == len(result.reasons)
    for reason, words in zip(
        result.reasons, (":3: not", ":4: a row", ":5: field 'answer'", ":7: not"), strict=True
    ):
        assert words in reason


def test_files_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    for name, message in (
        ("missing.jsonl", "no such file"),
        ("rows.csv", "ending in .jsonl or .parquet, not '.csv'"),
        ("rows.parquet", "not a readable parquet file"),
    ):
        with pytest.raises(RowError, match=message):
            read_rows(tmp_path / name, DataConfig(on_bad_row="skip"))
