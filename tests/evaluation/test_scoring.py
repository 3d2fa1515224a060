"""`megavila score` against transformers on text, and against what the rollout engine says of its own samples on video."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megavila.config import DataConfig, ScoreConfig, build
from megavila.data import PromptBuilder, PromptTemplate, load_tokenizer, read_rows
from megavila.evaluation.scoring import score_file
from megavila.runtime.errors import MegavilaError
from megavila.sft.run import run_sft
from tests.end_to_end.tiny import sft_config, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, videos and, in `runs/model/hf`, a model."""
    directory = tmp_path_factory.mktemp("score")
    write_world(directory, rows=3)
    run_sft(sft_config(directory, "model", run={"steps": 1}, checkpoint={"save_final": True}))
    return directory


def scored(world: Path, out: Path, rows: list[dict[str, object]], **settings: object) -> list[dict]:
    path = world / f"{out.stem}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(config(world, path, **settings), out)
    return [json.loads(line) for line in out.read_text().splitlines()]


def config(world: Path, rows: Path, **settings: object) -> ScoreConfig:
    values = {
        "model": {"path": str(world / "runs" / "model" / "hf")},
        "data": {"eval": [str(rows)], "num_frames": 3, "template": "compact"},
        "device": "cpu",
        **settings,
    }
    return build(ScoreConfig, values)


def video_rows(world: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    answers = [["A"], ["red so", [5, 6, 7], "B B B"], ["C", "the square moves right"]]
    return [row | {"responses": given} for row, given in zip(rows, answers, strict=True)]


def test_text_rows_have_the_logprobs_of_transformers(world: Path, tmp_path: Path) -> None:
    row = {"problem_id": "t", "problem": "Which colour moves?", "data_type": "text", "answer": "red"}
    (record,) = scored(
        world, tmp_path / "text.jsonl", [row | {"responses": ["red so", [5, 9]]}], temperature=0.7
    )
    llm = world / "runs" / "model" / "hf" / "llm"
    tokenizer = load_tokenizer(llm)
    data = DataConfig(eval=(str(world / "text.jsonl"),), template="compact")
    builder = PromptBuilder(tokenizer, PromptTemplate("compact"), data, 1, max_prompt_tokens=None)
    prompt = builder.build(read_rows(world / "text.jsonl", data).rows[0]).token_ids
    model = Qwen2ForCausalLM.from_pretrained(llm, dtype=torch.float64)
    expected_ids = [builder.encode_response("red so").tolist(), [5, 9]]
    for response, ids in zip(record["responses"], expected_ids, strict=True):
        assert response["token_ids"] == ids
        whole = torch.cat([prompt, torch.tensor(ids)])[None]
        with torch.no_grad():
            logits = model(whole).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(response["logprobs"]).double(), expected, rtol=1e-5, atol=1e-5
        )
        assert response["logprob_sum"] == pytest.approx(float(expected.sum()), rel=1e-5)


def test_layouts_and_budgets_agree(world: Path, tmp_path: Path) -> None:
    shared = scored(world, tmp_path / "shared.jsonl", video_rows(world))
    assert [len(record["responses"]) for record in shared] == [1, 3, 2]
    for name, settings in {
        "repeated": {"mrsp": {"layout": "repeated"}},
        "small": {"max_tokens_per_microbatch": 40, "batch_size": 2},
    }.items():
        other = scored(world, tmp_path / f"{name}.jsonl", video_rows(world), **settings)
        for one, two in zip(shared, other, strict=True):
            assert one["problem_id"] == two["problem_id"]
            for a, b in zip(one["responses"], two["responses"], strict=True):
                assert a["token_ids"] == b["token_ids"]
                torch.testing.assert_close(
                    torch.tensor(a["logprobs"]), torch.tensor(b["logprobs"]), rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("parallel", ["parallel.tensor_parallel=2", "parallel.tensor_parallel=1"])
def test_two_ranks_and_the_engines_own_logprobs(world: Path, tmp_path: Path, parallel: str) -> None:
    model = ["--model", str(world / "runs" / "model" / "hf")]
    settings = ["data.num_frames=3", "data.template=compact", "device=cpu"]
    samples, rows = tmp_path / "samples.jsonl", world / f"sampled_{parallel[-1]}.jsonl"
    generate = ["generate", *model, "--data", str(world / "train.jsonl"), "--out", str(samples), "-n", "3"]
    run([sys.executable, "-m", "megavila", *generate, *settings, "temperature=1", "max_response_tokens=6"])
    made = [json.loads(line) for line in samples.read_text().splitlines()]
    given = [
        row | {"responses": [response["token_ids"] for response in record["responses"]]}
        for row, record in zip(video_rows(world), made, strict=True)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    out = tmp_path / "scores.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(
        [
            *torchrun,
            "-m",
            "megavila",
            "score",
            *model,
            "--data",
            str(rows),
            "--out",
            str(out),
            *settings,
            parallel,
        ]
    )
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    for record, mine in zip(made, scores, strict=True):
        for response, score in zip(record["responses"], mine["responses"], strict=True):
            assert response["token_ids"] == score["token_ids"]
            torch.testing.assert_close(
                torch.tensor(response["logprobs"]), torch.tensor(score["logprobs"]), rtol=1e-4, atol=1e-5
            )


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("responses", "words"),
    [
        (None, "train.jsonl:1: field 'responses' is None"),
        ([], "at least one response"),
        ([3], "response 0 is 3"),
        ([[5, 99999]], "holds token 99999"),
    ],
)
def test_wrong_responses_name_row_and_value(
    world: Path, tmp_path: Path, responses: object, words: str
) -> None:
    path = tmp_path / "train.jsonl"
    row = {"problem_id": "t", "problem": "Which?", "data_type": "text", "answer": "red"}
    path.write_text(json.dumps(row | ({} if responses is None else {"responses": responses})) + "\n")
    with pytest.raises(MegavilaError, match=words):
        score_file(config(world, path), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
