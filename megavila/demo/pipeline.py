"""The demo's stages: videos, alignment, two stages of SFT, GRPO, exams, report. A demo that was stopped goes on where it was."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megavila.config import EvalConfig, GrpoRunConfig, SftRunConfig, load_config
from megavila.data import build_word_tokenizer, read_rows
from megavila.data.synth import synthesize
from megavila.data.synth.captions import write_captions
from megavila.demo import world
from megavila.demo.hooks import LATEST_START
from megavila.demo.report import Findings, write_report
from megavila.evaluation.answering import Answerer, open_answerer
from megavila.evaluation.evaluate import score_rows
from megavila.evaluation.result import EvalResult, load_result
from megavila.media import FrameCache, sample_video
from megavila.rl.run import run_grpo
from megavila.runtime.progress import track
from megavila.sft.run import run_sft

_CONFIGS = Path(__file__).parent
SPLITS = ("sft", "sft_longer", "rl", "exam")
FRAME_COUNTS = (4, 8, 12, 16, 24, 32)
FRAMES_QUESTIONS = 252
CAPTIONS_PER_VIDEO = 6
LAST_SECOND = 64  # of the time labels that the tokenizer knows
GIB = 2**30
_QUICK = ("run.steps=2", "optimizer.warmup_steps=0")


@dataclass(frozen=True)
class Demo:
    """One demo: everything is written under `directory`.

    Attributes:
        directory: for data, runs, scores and the report.
        seed: of videos, weights, order and sampling.
        settings: key=value of GRPO's config that win over the demo's own, such as rollout.engine=vllm.
        quick: few videos and few steps: every stage is walked through in a minute or two, and nothing is learned.
    """

    directory: Path
    seed: int = 0
    settings: tuple[str, ...] = ()
    quick: bool = False

    def run(self) -> Path:
        """Do what is not done yet and return the report's path."""
        self._grpo(self.directory)  # a mistaken setting is answered at once
        say = Console(stderr=True).print
        self.directory.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        say(
            f"[bold]Megavila demo[/], seed {self.seed}: about 15 minutes on two cores. Everything is in {self.directory}/"
        )
        with self._timed("data"):
            say("[bold]1/7[/] H.264 videos with questions, answers and reasoning")
            synthesize(world.demo_world(self._data, self.seed, self.quick))
            self._write_rows()
        frames = FrameCache(2 * GIB)
        with self._timed("data"):
            self._decode(frames)
        with self._timed("sft"):
            say("[bold]2/7[/] alignment: vision tower and decoder learn to name what a frame shows")
            align = self._trained(
                "align", lambda: run_sft(self._sft("align", None, "captions"), frames=frames)
            )
            say("[bold]3/7[/] long-CoT SFT, mostly on short videos")
            taught = ("sft", "sft_longer")
            reasoning = self._trained("sft", lambda: run_sft(self._sft("sft", align, *taught), frames=frames))
            say("[bold]4/7[/] SFT on direct answers")
            direct = self._trained(
                "direct", lambda: run_sft(self._sft("direct", reasoning, *taught), frames=frames)
            )
        with self._timed("grpo"):
            say("[bold]5/7[/] GRPO on short and longer videos")
            grpo = self._trained("grpo", lambda: run_grpo(self._grpo(direct), frames=frames))
        with self._timed("eval"):
            say("[bold]6/7[/] exams on held-out videos")
            curve = [f"frames_{count}" for count in FRAME_COUNTS]
            taught_to_reason = self._examine("sft", reasoning, ["exam"], frames)
            before = self._examine("direct", direct, ["exam", *curve], frames)
            after = self._examine("grpo", grpo, ["exam", "blank", *curve], frames)
        say("[bold]7/7[/] report")
        report = self._report(taught_to_reason, before, after)
        summary = json.loads((self.directory / "summary.json").read_text())
        scores = summary["accuracy"]
        say(
            f"accuracy {100 * scores['sft']:.1f} % after SFT, {100 * scores['grpo']:.1f} % after GRPO, "
            f"{100 * scores['grpo_blank_frames']:.1f} % with blank frames (chance {100 * scores['chance']:.1f} %); "
            f"{(time.monotonic() - started) / 60:.1f} minutes. Report: {report}"
        )
        return report

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _write_rows(self) -> None:
        """Caption rows, and a tokenizer of all words in use."""
        captions = write_captions(
            self._data / "sft.jsonl", self._data / "captions.jsonl", CAPTIONS_PER_VIDEO, self.seed
        )
        if (self._data / "tokenizer").exists():
            return
        texts = [" ".join(f"t{second}" for second in range(LAST_SECOND + LATEST_START))]
        for name in SPLITS:
            for row in _read_json_lines(self._data / f"{name}.jsonl"):
                texts += [
                    row["problem"],
                    " ; ".join(event["words"] for event in row["events"]),
                    row["conclusion"],
                ]
        texts += [row["problem"] + " " + row["answer"] for row in _read_json_lines(captions)]
        build_word_tokenizer(texts, self._data / "tokenizer")

    def _decode(self, frames: FrameCache) -> None:
        """Decode every video once, in threads, at the rate and size that all stages share."""
        config = self._sft("align", None, "captions")
        assert config.model.vision is not None
        side, data = config.model.vision.image_size, config.data
        files = [read_rows(self._data / f"{name}.jsonl", data) for name in SPLITS]
        paths = [row.videos[0] for file in files for row in file.rows]
        workers = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:
            videos = list(
                pool.map(lambda path: sample_video(path, fps=data.fps, max_frames=data.max_frames), paths)
            )
        for _ in track(frames.warm(videos, (side, side), workers), "decoding", total=len(videos)):
            pass

    def _sft(self, stage: str, start: Path | None, *splits: str) -> SftRunConfig:
        return load_config(SftRunConfig, _CONFIGS / f"{stage}.yaml", self._common(start, *splits))

    def _grpo(self, start: Path) -> GrpoRunConfig:
        return load_config(
            GrpoRunConfig, _CONFIGS / "grpo.yaml", [*self._common(start, "rl"), *self.settings]
        )

    def _common(self, start: Path | None, *splits: str) -> list[str]:
        model = f"model.path={start}" if start else f"model.tokenizer={self._data / 'tokenizer'}"
        return [
            model,
            *(_QUICK if self.quick else ()),
            f"run.output_dir={self.directory}",
            f"run.seed={self.seed}",
            f"data.train=[{','.join(str(self._data / f'{split}.jsonl') for split in splits)}]",
        ]

    def _trained(self, stage: str, train: Callable[[], Path]) -> Path:
        """The model that a stage exports last of all; training it where that is not there."""
        exported = self.directory / stage / "hf"
        return exported if exported.is_dir() else train()

    def _examine(
        self, stage: str, model: Path, names: Sequence[str], frames: FrameCache
    ) -> dict[str, EvalResult]:
        """Results of a stage's model by the name of the exam; those that are on disk are not made again.

        names: "exam", "blank" (the same questions with black frames) and "frames_<n>" (some of them, at most n frames a video).
        """
        folder = self.directory / "eval"
        results: dict[str, EvalResult] = {}
        config = load_config(
            EvalConfig,
            _CONFIGS / "eval.yaml",
            [f"model.path={model}", f"data.eval=[{self._data / 'exam.jsonl'}]", f"seed={self.seed}"],
        )
        with open_answerer(config, frames=frames) as answerer:
            rows = answerer.rows()
            papers: dict[str, Callable[[], EvalResult]] = {
                "exam": lambda: score_rows(answerer, rows),
                "blank": lambda: score_rows(answerer, rows, blank=True),
            }
            for count in FRAME_COUNTS:
                papers[f"frames_{count}"] = lambda n=count: score_rows(
                    _at_most(answerer, n), rows[:FRAMES_QUESTIONS]
                )
            for name in names:
                stem = f"{stage}_{name}"
                if not (folder / f"{stem}.json").exists():
                    papers[name]().save(folder, stem)
                results[name] = load_result(folder, stem)
        return results

    def _report(
        self,
        reasoning: dict[str, EvalResult],
        before: dict[str, EvalResult],
        after: dict[str, EvalResult],
    ) -> Path:
        config = load_config(GrpoRunConfig, self.directory / "grpo" / "config.yaml")
        exam = read_rows(self._data / "exam.jsonl", config.data).rows
        findings = Findings(
            seed=self.seed,
            reasoning=reasoning["exam"],
            sft=before["exam"],
            grpo=after["exam"],
            blank=after["blank"],
            longer=frozenset(row.problem_id for row in exam if world.is_longer(row)),
            sft_frames={n: before[f"frames_{n}"] for n in FRAME_COUNTS},
            grpo_frames={n: after[f"frames_{n}"] for n in FRAME_COUNTS},
            seconds={stage: self._seconds()[stage] for stage in ("data", "sft", "grpo", "eval")},
        )
        return write_report(self.directory, findings, config, exam)

    def _seconds(self) -> dict[str, float]:
        path = self.directory / "seconds.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the stage's wall time to `seconds.json`, whether it ends or is stopped: a resumed demo counts all its time."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = self._seconds()
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started
            (self.directory / "seconds.json").write_text(json.dumps(seconds) + "\n")


def _at_most(answerer: Answerer, frames: int) -> Answerer:
    """The same model, shown at most so many frames of a video: one a second, or fewer where that would be more."""
    config = answerer.config
    return replace(answerer, config=replace(config, data=replace(config.data, max_frames=frames)))


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
