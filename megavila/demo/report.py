"""The demo's report: figures, film strips and one HTML page that shows what was measured, and nothing else."""

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from megavila.config import DataConfig, GrpoRunConfig
from megavila.data import Row
from megavila.demo import plots
from megavila.demo.world import TAUGHT_EVENTS
from megavila.evaluation.result import EvalResult, Prediction
from megavila.media import load_frames, sample_video

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Findings:
    """All that the report is made of.

    Attributes:
        seed: of the whole demo.
        reasoning: results on the held-out questions of the model taught to reason, before SFT's direct answers.
        sft, grpo, blank: of the model that GRPO started from, after GRPO, and after GRPO with black frames.
        longer: problem ids of the questions on videos in which more happens than in most that SFT was taught on.
        sft_frames, grpo_frames: results by the most frames sampled from a video.
        seconds: by stage.
    """

    seed: int
    reasoning: EvalResult
    sft: EvalResult
    grpo: EvalResult
    blank: EvalResult
    longer: frozenset[str]
    sft_frames: Mapping[int, EvalResult]
    grpo_frames: Mapping[int, EvalResult]
    seconds: Mapping[str, float]

    def summary(self) -> dict[str, Any]:
        """The numbers of `summary.json`; accuracies from 0 to 1."""
        return {
            "seed": self.seed,
            "questions": len(self.grpo.predictions),
            "accuracy": {
                "sft_reasoning": self.reasoning.accuracy,
                "sft": self.sft.accuracy,
                "grpo": self.grpo.accuracy,
                "grpo_blank_frames": self.blank.accuracy,
                "chance": self.grpo.chance,
            },
            "accuracy_by_length": {
                name: {stage: part.accuracy for stage, part in self.by_length(result).items()}
                for name, result in (
                    ("sft_reasoning", self.reasoning),
                    ("sft", self.sft),
                    ("grpo", self.grpo),
                )
            },
            "accuracy_by_frames": {
                "sft": {str(n): r.accuracy for n, r in self.sft_frames.items()},
                "grpo": {str(n): r.accuracy for n, r in self.grpo_frames.items()},
            },
            "accuracy_by_category": {"sft": self.sft.by_category(), "grpo": self.grpo.by_category()},
            "seconds": dict(self.seconds),
        }

    def by_length(self, result: EvalResult) -> dict[str, EvalResult]:
        """A result's questions on videos as short as those taught, and on longer ones."""
        parts: dict[str, list[Prediction]] = {"taught": [], "longer": []}
        for prediction in result.predictions:
            parts["longer" if prediction.problem_id in self.longer else "taught"].append(prediction)
        return {name: EvalResult(tuple(part)) for name, part in parts.items()}

    def story(self) -> list[str]:
        """What SFT could do and what RL added, in words, from the numbers; one string a paragraph."""
        reasoning, start, end = map(self.by_length, (self.reasoning, self.sft, self.grpo))
        gain = 100 * (self.grpo.accuracy - self.sft.accuracy)
        over = 100 * (self.grpo.accuracy - self.reasoning.accuracy)
        return [
            f"SFT first teaches worked reasoning on videos with 1 to {TAUGHT_EVENTS} events that matter, and a few with more. "
            f"Asked to reason, that model is right in {_percent(self.reasoning)} of cases: {_percent(reasoning['taught'])} on "
            f"videos of the length taught, {_percent(reasoning['longer'])} on longer ones. SFT then ends with direct answers: "
            "the model seldom reasons any more, and without reasoning it is right in "
            f"{_percent(self.sft)}, where chance is {100 * self.grpo.chance:.1f} %. GRPO starts there.",
            "GRPO sees no reasoning: its only signal is a reward for a right answer in the right form. It is now right in "
            f"{_percent(self.grpo)} of cases ({gain:+.1f} points): {_percent(end['taught'])} (from {_percent(start['taught'])}) "
            f"on videos of the length taught, {_percent(end['longer'])} (from {_percent(start['longer'])}) on longer ones. "
            f"Beside the model that was taught to reason, it differs by {over:+.1f} points: what is beyond that model RL "
            "added; the rest is reasoning which SFT had taught and RL found to be worth its while.",
            f"With black frames in place of the videos it is right in {_percent(self.blank)}.",
        ]


def write_report(directory: Path, findings: Findings, grpo: GrpoRunConfig, rows: Sequence[Row]) -> Path:
    """Write `summary.json`, `plots/*.png` and `report.html` into `directory` and return the page.

    grpo: config of the GRPO run, whose metrics are plotted. rows: the held-out rows, of which a few are shown as
    film strips.
    """
    figures = directory / "plots"
    summary = findings.summary()
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plots.reward_curves(
        plots.read_metrics(grpo.run.directory / "metrics.jsonl"), figures / "reward_curves.png"
    )
    plots.accuracy_by_frames(
        {n: r.accuracy for n, r in findings.sft_frames.items()},
        {n: r.accuracy for n, r in findings.grpo_frames.items()},
        findings.grpo.chance,
        figures / "accuracy_by_frames.png",
    )
    plots.accuracy_by_category(
        findings.sft.by_category(),
        findings.grpo.by_category(),
        findings.grpo.chance,
        figures / "accuracy_by_category.png",
    )
    letter, share = findings.grpo.always_one_letter
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template(_TEMPLATE).render(
        summary=summary,
        story=findings.story(),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        total_seconds=sum(findings.seconds.values()),
        scores=[
            ("SFT, reasoning", findings.reasoning.summary()),
            ("SFT, direct answers: where GRPO starts", findings.sft.summary()),
            ("SFT + GRPO", findings.grpo.summary()),
            ("SFT + GRPO, frames blanked", findings.blank.summary()),
        ],
        always={"letter": letter, "accuracy": share},
        frames_questions=len(next(iter(findings.grpo_frames.values())).predictions),
        weights={"accuracy": grpo.reward.accuracy_weight, "format": grpo.reward.format_weight},
        clips=_clips(findings, rows, grpo.data, figures),
        image=lambda name: _data_url(figures / name),
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _clips(findings: Findings, rows: Sequence[Row], data: DataConfig, figures: Path) -> list[dict[str, Any]]:
    """One video of each category, and the first that GRPO still gets wrong, so that the page flatters nobody."""
    before = {p.problem_id: p for p in findings.sft.predictions}
    after = findings.grpo.predictions
    chosen: list[Prediction] = []
    for category in findings.grpo.by_category():
        chosen.append(next(p for p in after if p.category == category))
    wrong = [p for p in after if p.accuracy == 0 and p not in chosen]
    chosen += wrong[:1]
    by_id = {row.problem_id: row for row in rows}
    clips = []
    for number, prediction in enumerate(chosen):
        row = by_id[prediction.problem_id]
        video = sample_video(row.videos[0], fps=data.fps, max_frames=data.max_frames)
        strip = f"strip_{number}.png"
        plots.film_strip(load_frames(video, None).numpy(), video.timestamps, figures / strip)
        responses = [
            (name, p.response, p.accuracy == 1)
            for name, p in (("SFT", before[row.problem_id]), ("SFT + GRPO", prediction))
        ]
        clips.append(
            {
                "category": row.category,
                "duration": video.duration,
                "num_frames": video.num_frames,
                "strip": strip,
                "problem": row.problem,
                "answer": row.answer,
                "responses": responses,
            }
        )
    return clips


def _percent(result: EvalResult) -> str:
    return f"{100 * result.accuracy:.1f} %"


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
