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
from megavila.evaluation.result import EvalResult, Prediction
from megavila.media import load_frames, sample_video

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Findings:
    """All that the report is made of.

    Attributes:
        seed: of the whole demo.
        sft, grpo, blank: results on the held-out questions; `blank` is the GRPO model with black frames.
        sft_easy, grpo_easy: on held-out questions as easy as those SFT was taught on.
        sft_frames, grpo_frames: results by number of frames sampled.
        seconds: by stage.
        taught, examined: words for what SFT was taught on and what the questions are about.
    """

    seed: int
    sft: EvalResult
    grpo: EvalResult
    blank: EvalResult
    sft_easy: EvalResult
    grpo_easy: EvalResult
    sft_frames: Mapping[int, EvalResult]
    grpo_frames: Mapping[int, EvalResult]
    seconds: Mapping[str, float]
    taught: str
    examined: str

    def summary(self) -> dict[str, Any]:
        """The numbers of `summary.json`; accuracies from 0 to 1."""
        return {
            "seed": self.seed,
            "questions": len(self.grpo.predictions),
            "accuracy": {
                "sft": self.sft.accuracy,
                "grpo": self.grpo.accuracy,
                "grpo_blank_frames": self.blank.accuracy,
                "chance": self.grpo.chance,
            },
            "accuracy_easy": {"sft": self.sft_easy.accuracy, "grpo": self.grpo_easy.accuracy},
            "accuracy_by_frames": {
                "sft": {str(n): r.accuracy for n, r in self.sft_frames.items()},
                "grpo": {str(n): r.accuracy for n, r in self.grpo_frames.items()},
            },
            "accuracy_by_category": {"sft": self.sft.by_category(), "grpo": self.grpo.by_category()},
            "seconds": dict(self.seconds),
        }

    def story(self) -> str:
        """What SFT could do and what RL added, in words, from the numbers."""
        gain = 100 * (self.grpo.accuracy - self.sft.accuracy)
        return (
            f"SFT was taught, with worked reasoning, on {self.taught}. On new questions of that kind it is right in "
            f"{_percent(self.sft_easy)} of cases. The questions of this page are harder: {self.examined}. There the SFT model "
            f"is right in {_percent(self.sft)} of cases. GRPO then trained on other videos of that harder kind with nothing but "
            "a reward for a right answer in the right form: no reasoning was shown to it. It is now right in "
            f"{_percent(self.grpo)} of cases ({gain:+.1f} points), and in {_percent(self.grpo_easy)} of the easy ones. With black "
            f"frames in place of the videos it is right in {_percent(self.blank)} (chance is {100 * self.grpo.chance:.1f} %)."
        )


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
            ("SFT", findings.sft.summary()),
            ("SFT + GRPO", findings.grpo.summary()),
            ("SFT + GRPO, frames blanked", findings.blank.summary()),
            ("SFT, easy questions", findings.sft_easy.summary()),
            ("SFT + GRPO, easy questions", findings.grpo_easy.summary()),
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
