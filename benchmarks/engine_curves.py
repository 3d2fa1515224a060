"""Reward curves of GRPO with either rollout engine, from the same model and seeds: they should be the same curve.

    megavila demo && python -m benchmarks.engine_curves runs/demo --steps 40

Each run is a process of its own: `pretrain_grpo.py` with the demo's settings, on the demo's videos, from the model that its
GRPO started from. Of each engine the band between the lowest and the highest seed is kept; where the bands of two engines
overlap at a step, seeds differ more than engines do.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import typer

from benchmarks.machine import ROOT, measured, results_directory
from megavila.demo.plots import read_metrics, running_mean

ENGINES = ("megatron", "vllm")
WINDOW = 5


def main(
    demo: Annotated[Path, typer.Argument(help="Directory of a finished demo.")],
    steps: Annotated[int, typer.Option(help="GRPO steps of each run.")] = 40,
    seeds: Annotated[int, typer.Option(help="Runs with each engine.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="File of results (JSON); the figure lies beside it.")
    ] = None,
) -> None:
    """Train with both engines from every seed and print and save the bands and their overlap."""
    curves: dict[str, list[list[float]]] = {engine: [] for engine in ENGINES}
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    differences: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            for engine in ENGINES:
                metrics = train(demo, engine, seed, steps, Path(scratch))
                curves[engine].append([row["reward/mean"] for row in metrics])
                seconds[engine].append(float(np.median([row["time/rollout"] for row in metrics])))
                if engine == "vllm":
                    differences.append(max(row["rollout/logprob_abs_diff_max"] for row in metrics))
                print(
                    f"seed {seed}, {engine}: reward {curves[engine][-1][0]:.3f} to {curves[engine][-1][-1]:.3f}",
                    flush=True,
                )
    bands = {engine: band(rows) for engine, rows in curves.items()}
    result = {
        "measured": measured(f"python -m benchmarks.engine_curves runs/demo --steps {steps} --seeds {seeds}"),
        "overlapping_steps": overlap(bands["megatron"], bands["vllm"]),
        "window": WINDOW,
        "median_rollout_seconds": seconds,
        "largest_logprob_difference_of_vllm": max(differences),
        "reward": curves,
    }
    target = out or results_directory() / "engine_curves.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    plot(bands, curves, target.with_suffix(".png"))
    print(f"the bands overlap at {100 * result['overlapping_steps']:.0f} % of the steps; {target}")


def train(demo: Path, engine: str, seed: int, steps: int, scratch: Path) -> list[dict[str, Any]]:
    """Metrics of one run's steps."""
    name = f"{engine}-{seed}"
    command = [
        sys.executable,
        str(ROOT / "pretrain_grpo.py"),
        "--config",
        str(ROOT / "megavila" / "demo" / "grpo.yaml"),
        f"model.path={demo / 'direct' / 'hf'}",
        f"data.train=[{demo / 'data' / 'rl.jsonl'}]",
        f"run.name={name}",
        f"run.output_dir={scratch}",
        f"run.seed={seed}",
        f"run.steps={steps}",
        f"rollout.engine={engine}",
        "rollout.kv_cache_gib=0.25",
        "checkpoint.every=0",
        "checkpoint.save_final=false",
    ]
    print(f"{name}:", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    metrics = read_metrics(scratch / name / "metrics.jsonl")
    if failures := sum(row["rollout/engine_failures"] for row in metrics):
        sys.exit(f"{name}: the engine failed {failures} times; find out why before comparing its curve")
    return metrics


def band(curves: list[list[float]]) -> np.ndarray:
    """(2, steps): lowest and highest of the seeds' running means."""
    smooth = np.array([running_mean(curve, WINDOW) for curve in curves])
    return np.stack([smooth.min(axis=0), smooth.max(axis=0)])


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the steps at which two bands (2, steps) have a value in common."""
    return float((np.maximum(one[0], other[0]) <= np.minimum(one[1], other[1])).mean())


def plot(bands: dict[str, np.ndarray], curves: dict[str, list[list[float]]], path: Path) -> None:
    """The bands, and the mean of each engine's seeds."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for engine, (low, high) in bands.items():
        steps = np.arange(1, len(low) + 1)
        mean = running_mean(np.mean(curves[engine], axis=0), WINDOW)
        axis.fill_between(steps, low, high, alpha=0.25)
        axis.plot(steps, mean, label=engine)
    axis.set(xlabel="GRPO step", ylabel="reward, mean of the last 5 steps")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
