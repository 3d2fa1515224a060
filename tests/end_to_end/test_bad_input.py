"""A user's mistakes: exit code 2 and one message, or skipped and counted where that is allowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megavila.config import GrpoRunConfig, SftRunConfig
from megavila.rl.run import run_grpo
from megavila.runtime.metrics import read_metrics
from megavila.sft.run import run_sft
from megavila.training.entry import main
from tests.end_to_end.tiny import settings, write_audio_only, write_world

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bad")
    write_world(directory, rows=4)
    whole = (directory / "0.mp4").read_bytes()
    (directory / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (directory / "empty.mp4").touch()
    (directory / "text.mp4").write_text("this is not a video")
    write_audio_only(directory / "audio.mp4")
    return directory


def rows_with(world, name, **changes):
    """A file with the sound rows and a changed copy of the first; None deletes a field."""
    sound = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    changed = {**sound[0], "problem_id": "bad", **changes}
    changed = {key: value for key, value in changed.items() if value is not None}
    path = world / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*sound, changed]))
    return path


def start(world, name, arguments, monkeypatch, kind="sft", **sections):
    """Run the entry in this process; returns its exit code."""
    path = world / f"{name}.yaml"
    sections["run"] = {"steps": 2, **sections.get("run", {})}
    if kind == "sft":
        sections["sft"] = {"batch_size": 4, **sections.get("sft", {})}
    path.write_text(yaml.safe_dump({**settings(world, name, **sections)}))
    monkeypatch.setattr(sys, "argv", ["pretrain", "--config", str(path), *arguments])
    cls, run = {"sft": (SftRunConfig, run_sft), "grpo": (GrpoRunConfig, run_grpo)}[kind]
    return main(cls, run, "test")


def one_message(capsys):
    """Standard error, which must be one message without a traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.count("error: ") == 1, text
    return " ".join(text.split())


BAD_VIDEOS = ["missing.mp4", "truncated.mp4", "empty.mp4", "text.mp4", "audio.mp4"]


@pytest.mark.parametrize("video", BAD_VIDEOS)
def test_bad_video_stops_the_run(world, video, monkeypatch, capsys):
    rows = rows_with(world, f"stop-{video}", videos=video)
    arguments = [f"data.train={rows}", "sft.batch_size=5"]
    assert start(world, f"stop-{video}", arguments, monkeypatch) == 2
    assert video in one_message(capsys)


def test_bad_videos_are_skipped_and_counted(world, monkeypatch, capsys):
    sound = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    bad = [{**sound[0], "problem_id": name, "videos": name} for name in BAD_VIDEOS]
    rows = world / "skip.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*sound, *bad]))
    arguments = [f"data.train={rows}", "data.on_bad_media=skip", "sft.batch_size=9", "run.steps=1"]
    assert start(world, "skip", arguments, monkeypatch) == 0
    (metrics,) = read_metrics(world / "runs" / "skip" / "metrics.jsonl")
    # Nine prompts are asked for; rows whose videos do not even open are made up for by others.
    assert metrics["media/failed"] >= 5
    assert 8 <= metrics["media/videos"] <= 9
    errors = " ".join(capsys.readouterr().err.split())
    assert all(name in errors for name in BAD_VIDEOS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": "<answer>D</answer>"}, ["rows.jsonl:5", "answer", "'D'"]),
        ({"answer": None}, ["rows.jsonl:5", "answer", "missing"]),
        ({"problem": 7.5, "videos": [3]}, ["rows.jsonl:5", "videos"]),
        ({"data_type": "hologram"}, ["rows.jsonl:5", "hologram"]),
    ],
)
def test_malformed_row(world, changes, words, monkeypatch, capsys):
    rows = rows_with(world, "rows", **changes)
    assert start(world, "rows", [f"data.train={rows}"], monkeypatch) == 2
    message = one_message(capsys)
    assert all(word in message for word in words), message


def test_line_that_is_no_json_and_skipping_it(world, monkeypatch, capsys):
    rows = world / "broken.jsonl"
    rows.write_text((world / "train.jsonl").read_text() + '{"problem_id": \n')
    assert start(world, "broken", [f"data.train={rows}"], monkeypatch) == 2
    assert "broken.jsonl:5" in one_message(capsys)
    assert (
        start(world, "broken", [f"data.train={rows}", "data.on_bad_row=skip", "run.steps=1"], monkeypatch)
        == 0
    )
    (metrics,) = read_metrics(world / "runs" / "broken" / "metrics.jsonl")
    assert metrics["data/skipped_rows"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.learning_rate=1e-4"], ["optimizer.learning_rate", "optimizer.lr"]),
        (["sft.max_tokens_per_microbatch=12"], ["tokens", "12"]),
        (["model.tokenizer=/nowhere"], ["/nowhere"]),
        (["parallel.tensor_parallel=3"], ["3"]),
        (["data.train=/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["model.language.vocab_size=5"], ["vocab_size", "5"]),
        (["run.device=cuda"], ["cuda"]),
    ],
)
def test_bad_setting(world, arguments, words, monkeypatch, capsys):
    assert start(world, "setting", arguments, monkeypatch) == 2
    message = one_message(capsys)
    assert all(word in message for word in words), message


def test_row_without_reasoning_cannot_be_taught(world, monkeypatch, capsys):
    rows = rows_with(world, "silent", reasoning=None)
    assert start(world, "silent", [f"data.train={rows}", "sft.batch_size=5"], monkeypatch) == 2
    assert "silent.jsonl:5" in one_message(capsys)


def test_grpo_finds_contradictions_before_it_samples(world, monkeypatch, capsys):
    arguments = ["grpo.max_tokens_per_microbatch=100", "rollout.max_response_tokens=100"]
    assert start(world, "budget", arguments, monkeypatch, kind="grpo") == 2
    assert "max_response_tokens" in one_message(capsys)
    assert (
        start(
            world,
            "plugin",
            ["reward.functions=[nowhere:f]", "reward.function_weights=[1]"],
            monkeypatch,
            kind="grpo",
        )
        == 2
    )
    assert "nowhere" in one_message(capsys)


def test_as_a_user_starts_it(world):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(REPOSITORY / "pretrain_sft.py"), "--config", str(world / "nowhere.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("error: ") == 1 and "nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr
