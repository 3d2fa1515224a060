"""`run.eval_every`: the model is scored on the way, and scoring leaves no trace in training."""

import json

from safetensors.torch import load_file

from megavila.rl.run import run_grpo
from megavila.runtime.metrics import read_metrics
from megavila.sft.run import run_sft
from tests.end_to_end.tiny import grpo_config, sft_config, write_world


def test_scores_join_the_metrics_and_training_is_unchanged(tmp_path):
    rows = write_world(tmp_path, rows=4)
    for build, run in ((sft_config, run_sft), (grpo_config, run_grpo)):
        kind = run.__name__
        plain = run(build(tmp_path, f"{kind}-plain"))
        scored = run(build(tmp_path, f"{kind}-scored", run={"eval_every": 2}, data={"eval": [str(rows)]}))
        metrics = read_metrics(tmp_path / "runs" / f"{kind}-scored" / "metrics.jsonl")
        assert [row["step"] for row in metrics if "eval/accuracy" in row] == [2]
        assert metrics[1]["eval/accuracy/Spatial"] == metrics[1]["eval/accuracy"]
        predictions = tmp_path / "runs" / f"{kind}-scored" / "eval" / "step_000002.predictions.jsonl"
        assert len(predictions.read_text().splitlines()) == 4
        summary = json.loads(predictions.with_name("step_000002.json").read_text())
        assert summary["accuracy"] == metrics[1]["eval/accuracy"]
        files = sorted(path.relative_to(plain) for path in plain.rglob("*.safetensors"))
        assert files
        for file in files:
            theirs = load_file(plain / file)
            assert all((theirs[n] == t).all() for n, t in load_file(scored / file).items())
