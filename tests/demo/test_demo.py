"""The demo from end to end, as a user runs it, with few videos and few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def megavila(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megavila.cli.main", *arguments], capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "run"
    done = megavila("demo", "--quick", "--out", str(directory))
    assert done.returncode == 0, done.stderr
    return directory


def test_report_and_summary(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"sft_reasoning", "sft", "grpo", "grpo_blank_frames", "chance"}
    assert summary["accuracy"]["chance"] == pytest.approx(1 / 3)
    assert set(summary["accuracy_by_category"]["grpo"]) == {
        "Spatial",
        "Temporal",
        "Goal and Purpose",
        "Plot and Narrative",
    }
    assert set(summary["accuracy_by_frames"]["sft"]) == set(summary["accuracy_by_frames"]["grpo"])
    assert set(summary["seconds"]) == {"data", "sft", "grpo", "eval"} and min(summary["seconds"].values()) > 0
    page = (demo / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 + 4  # three figures and a film strip for each category
    for stage in ("align", "sft", "direct", "grpo"):
        assert len((demo / stage / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_finished_demo_is_not_done_again(demo: Path) -> None:
    weights = demo / "grpo" / "hf" / "llm" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    done = megavila("demo", "--quick", "--out", str(demo))
    assert done.returncode == 0, done.stderr
    assert weights.stat().st_mtime_ns == before


def test_other_commands_on_what_it_made(demo: Path, tmp_path: Path) -> None:
    rows, model = str(demo / "data" / "exam.jsonl"), str(demo / "grpo" / "hf")
    config = str(Path(__file__).parents[2] / "megavila" / "demo" / "eval.yaml")
    scores = megavila(
        "eval",
        "--config",
        config,
        "--model",
        model,
        "--data",
        rows,
        "num_frames=[4,8]",
        f"output={tmp_path / 'scores'}",
        "limit=8",
    )
    assert scores.returncode == 0, scores.stderr
    assert json.loads((tmp_path / "scores" / "scores_4_frames.json").read_text())["questions"] == 8
    out = tmp_path / "out.jsonl"
    made = megavila(
        "generate",
        "--config",
        config,
        "--model",
        model,
        "--data",
        rows,
        "--out",
        str(out),
        "-n",
        "3",
        "temperature=1.0",
        "limit=4",
    )
    assert made.returncode == 0, made.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 4 and all(len(record["responses"]) == 3 for record in records)
    assert all(len(r["logprobs"]) == len(r["token_ids"]) for record in records for r in record["responses"])
    checkpoint = next((demo / "grpo" / "checkpoints").glob("step_*"))
    converted = megavila("convert", str(checkpoint), "--out", str(tmp_path / "hf"))
    assert converted.returncode == 0, converted.stderr
    exported = (tmp_path / "hf" / "llm" / "model.safetensors").read_bytes()
    assert exported == (demo / "grpo" / "hf" / "llm" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--data", "nowhere.jsonl", "model.path=nowhere"], "nowhere"),
        (["eval", "modle.path=x"], "model.path"),
        (["video", "info", "nowhere.mp4"], "nowhere.mp4: no such file"),
        (["data", "synth", "--out", "x", "--events", "4-2"], "write the lower bound first"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = megavila(*arguments)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
