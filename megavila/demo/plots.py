"""The demo's figures, each written as one PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import numpy as np  # noqa: E402

SFT_COLOUR, GRPO_COLOUR, CHANCE_COLOUR = "#8c9bab", "#1f77b4", "#b03a2e"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, in order of step."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def reward_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Overall, format and accuracy reward by GRPO step (the paper's figure 10), with a running mean."""
    panels = (
        ("reward/mean", "Overall reward"),
        ("reward/format", "Format reward"),
        ("reward/accuracy", "Accuracy reward"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.1), sharex=True)
    steps = [m["step"] for m in metrics]
    for axis, (key, title) in zip(axes, panels, strict=True):
        values = [m[key] for m in metrics]
        axis.plot(steps, values, color=GRPO_COLOUR, alpha=0.3, linewidth=1)
        axis.plot(steps, running_mean(values, max(3, len(values) // 12)), color=GRPO_COLOUR, linewidth=2)
        axis.set(title=title, xlabel="GRPO step", ylim=(0, 1.03))
        axis.grid(alpha=0.3)
    _save(figure, path)


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values at each position (fewer at the start)."""
    total = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (total[ends] - total[starts]) / (ends - starts)


def accuracy_by_frames(
    sft: Mapping[int, float], grpo: Mapping[int, float], chance: float, path: Path
) -> None:
    """Accuracy against the most frames sampled from a video, before and after RL (the paper's figure 8)."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    for scores, colour, label in ((sft, SFT_COLOUR, "SFT"), (grpo, GRPO_COLOUR, "SFT + GRPO")):
        frames = sorted(scores)
        axis.plot(frames, [100 * scores[n] for n in frames], "o-", color=colour, label=label, linewidth=2)
    axis.axhline(100 * chance, color=CHANCE_COLOUR, linestyle=":", label="chance")
    axis.set(
        xlabel="at most so many frames, of one a second",
        ylabel="accuracy (%)",
        ylim=(0, 101),
        xticks=sorted(grpo),
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    _save(figure, path)


def accuracy_by_category(
    sft: Mapping[str, float], grpo: Mapping[str, float], chance: float, path: Path
) -> None:
    """Accuracy by the paper's four categories, before and after RL."""
    names = sorted(grpo)
    x = np.arange(len(names))
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    for offset, scores, colour, label in (
        (-0.2, sft, SFT_COLOUR, "SFT"),
        (0.2, grpo, GRPO_COLOUR, "SFT + GRPO"),
    ):
        bars = axis.bar(x + offset, [100 * scores[n] for n in names], 0.38, color=colour, label=label)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.axhline(100 * chance, color=CHANCE_COLOUR, linestyle=":", label="chance")
    axis.set_xticks(x, [n.replace(" and ", "\nand ") for n in names])
    axis.set(ylabel="accuracy (%)", ylim=(0, 112))
    axis.legend(frameon=False, ncols=3, loc="upper left")
    _save(figure, path)


def film_strip(frames: np.ndarray, timestamps: Sequence[float], path: Path, columns: int = 12) -> None:
    """Sampled frames in reading order with their times; frames: uint8 (n, 3, h, w), timestamps in seconds."""
    n = len(frames)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns, 1.18 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, frame, seconds in zip(axes.flat, frames, timestamps, strict=False):
        axis.imshow(frame.transpose(1, 2, 0), interpolation="nearest")
        axis.set_title(f"{seconds:.1f} s", fontsize=7, pad=2)
    figure.subplots_adjust(wspace=0.04, hspace=0.25, left=0, right=1, bottom=0, top=0.93)
    _save(figure, path, tight=False)


def _save(figure: Any, path: Path, tight: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
