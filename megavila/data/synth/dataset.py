"""Writes splits of the synthetic world: MP4 files and one JSON Lines file each, in parallel, resumable."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megavila.data.synth import goal, plot, spatial, temporal
from megavila.data.synth.encode import encode, render
from megavila.data.synth.rows import to_row
from megavila.data.synth.scene import (
    CATEGORIES,
    GOAL,
    PLOT,
    SPATIAL,
    TEMPORAL,
    Difficulty,
    Event,
    Scene,
    WorldError,
)
from megavila.runtime.progress import Progress as ProgressBar

Progress = Callable[[str, int, int], None]
"""Called with the split's name, rows that are ready, and rows in all."""

_MAKERS = {SPATIAL: spatial.make, TEMPORAL: temporal.make, GOAL: goal.make, PLOT: plot.make}


@dataclass(frozen=True)
class DifficultyRange:
    """Bounds, inclusive, from which every video's :class:`Difficulty` is drawn evenly.

    Attributes:
        events, decoys, distractors: whole numbers (lowest, highest).
        slack_seconds: idle seconds (lowest, highest).
        event_seconds, intro_seconds, gap_seconds, drift, noise: as in :class:`Difficulty`.
    """

    events: tuple[int, int] = (2, 4)
    decoys: tuple[int, int] = (0, 1)
    distractors: tuple[int, int] = (0, 2)
    slack_seconds: tuple[float, float] = (0.0, 0.0)
    event_seconds: float = 3.0
    intro_seconds: float = 3.0
    gap_seconds: tuple[float, float] = (1.0, 2.0)
    drift: float = 2.0
    noise: float = 8.0

    def __post_init__(self) -> None:
        for name in ("events", "decoys", "distractors", "slack_seconds"):
            low, high = getattr(self, name)
            if low > high:
                raise WorldError(f"{name} is ({low}, {high}); write the lower bound first")
        Difficulty(self.events[0], self.decoys[0], self.distractors[0], **self._fixed())

    def _fixed(self) -> dict[str, Any]:
        names = ("event_seconds", "intro_seconds", "gap_seconds", "drift", "noise")
        return {name: getattr(self, name) for name in names}

    def draw(self, rng: np.random.Generator) -> Difficulty:
        """One difficulty."""
        events, decoys, distractors = (
            int(rng.integers(low, high + 1)) for low, high in (self.events, self.decoys, self.distractors)
        )
        slack = float(rng.uniform(*self.slack_seconds))
        return Difficulty(events, decoys, distractors, slack_seconds=slack, **self._fixed())


@dataclass(frozen=True)
class SplitConfig:
    """One split: its name (also its seed), how many rows, and how hard.

    Attributes:
        name: letters, digits, ``-`` and ``_``.
        count: rows; categories take turns.
        difficulty: bounds of the difficulty.
        categories: a subset of the four, each at most once.
        dark_share: share of the videos whose picture is black throughout: they teach that nothing can be seen, and
            that an answer is then a guess.
    """

    name: str
    count: int
    difficulty: DifficultyRange = field(default_factory=DifficultyRange)
    categories: tuple[str, ...] = CATEGORIES
    dark_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise WorldError(f"split name {self.name!r} may hold only letters, digits, '-' and '_'")
        if self.count < 1:
            raise WorldError(f"split {self.name!r} has count {self.count}; it must be at least 1")
        if not 0 <= self.dark_share <= 1:
            raise WorldError(f"split {self.name!r} has dark_share {self.dark_share}; it must be from 0 to 1")
        unknown = [name for name in self.categories if name not in CATEGORIES]
        if unknown or not self.categories or len(set(self.categories)) < len(self.categories):
            raise WorldError(f"categories are {self.categories}; choose from {CATEGORIES}, each at most once")


@dataclass(frozen=True)
class WorldConfig:
    """Everything :func:`synthesize` needs.

    Attributes:
        out_dir: receives ``<split>.jsonl`` and ``videos/<split>/*.mp4``.
        splits: the splits; names must differ.
        seed: the world's seed; a split's rows depend on (seed, split name, row index) alone.
        size: side of the square pictures in pixels, even, at least 42.
        fps: frames per second, at least 1.
        crf: x264 quality, 0 to 51.
        shuffle_options: draw the options' order anew for every row instead of keeping one per question.
        workers: processes; 0 means one per available core.
    """

    out_dir: Path
    splits: tuple[SplitConfig, ...]
    seed: int = 0
    size: int = 84
    fps: int = 4
    crf: int = 26
    shuffle_options: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        names = [split.name for split in self.splits]
        if not names or len(set(names)) < len(names):
            raise WorldError(f"splits are named {names}; give at least one, each name once")
        if self.size < 42 or self.size % 2:
            raise WorldError(f"size is {self.size}; it must be even and at least 42")
        if self.fps < 1 or not 0 <= self.crf <= 51:
            raise WorldError(f"fps is {self.fps} (at least 1) and crf {self.crf} (0 to 51)")
        if self.seed < 0 or self.workers < 0:
            raise WorldError(f"seed ({self.seed}) and workers ({self.workers}) cannot be negative")


def generator(seed: int, split: str, *keys: int) -> np.random.Generator:
    """The random generator of one row: equal keys give equal rows, different splits never share a stream."""
    digest = hashlib.sha256(split.encode()).digest()
    words = np.frombuffer(digest[:16], dtype=np.uint32).tolist()
    return np.random.default_rng(np.random.SeedSequence([seed, *words, *keys]))


def make_scene(
    category: str,
    difficulty: Difficulty,
    rng: np.random.Generator,
    answer: int | None = None,
    shuffle: bool = False,
) -> Scene:
    """Draws one scene.

    Args:
        category: one of CATEGORIES.
        difficulty: how long and hard.
        rng: source of all chance.
        answer: index that the right option must have; None leaves it to chance.
        shuffle: put the options into a random order.

    Raises:
        WorldError: unknown category, or the answer cannot be reached at this difficulty.
    """
    if category not in _MAKERS:
        raise WorldError(f"unknown category {category!r}; choose from {CATEGORIES}")
    for _ in range(1000):
        scene = _MAKERS[category](difficulty, rng)
        if shuffle:
            order = rng.permutation(len(scene.options)).tolist()
            options = tuple(scene.options[index] for index in order)
            scene = replace(scene, options=options, answer=order.index(scene.answer))
        if answer is None or scene.answer == answer:
            return scene
    raise WorldError(f"no {category} scene with option {answer} as its answer at {difficulty}")


def row_scene(config: WorldConfig, split: SplitConfig, index: int) -> Scene:
    """The scene of row ``index`` of a split; letters come in shuffled blocks, so they are balanced."""
    turn, place = divmod(index, len(split.categories))
    category = split.categories[place]
    block, step = divmod(turn, 3)
    letters = generator(config.seed, split.name, 1, CATEGORIES.index(category), block).permutation(3).tolist()
    rng = generator(config.seed, split.name, 0, index)
    difficulty = split.difficulty.draw(rng)
    scene = make_scene(category, difficulty, rng, letters[step], config.shuffle_options)
    dark = generator(config.seed, split.name, 3, index).random() < split.dark_share
    return darken(scene) if dark else scene


def darken(scene: Scene) -> Scene:
    """The same question about a black picture; the answer stays, and can only be guessed."""
    nothing = Event(
        0.0, float(scene.duration), "intro", "dark", "the picture is black, nothing can be seen", {}
    )
    guess = f"This is a guess: {scene.options[scene.answer]}"
    return replace(scene, events=(nothing,), summary=guess, facts={**scene.facts, "dark": True})


def video_path(split: str, index: int) -> str:
    """Path of a row's video relative to the row file."""
    return f"videos/{split}/{index:06d}.mp4"


def write_split(config: WorldConfig, split: SplitConfig, progress: Progress | None = None) -> Path:
    """Writes one split; files that are there already are kept if they were made from the same settings.

    Args:
        config: the world.
        split: one of its splits.
        progress: told after every few rows.

    Returns:
        Path of the JSON Lines file, which is written last.
    """
    folder = config.out_dir / "videos" / split.name
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(config, split, folder)
    lines: list[str] = []
    for line in _map(_Job(config, split), split.count, config.workers):
        lines.append(line)
        if progress is not None and (len(lines) % 8 == 0 or len(lines) == split.count):
            progress(split.name, len(lines), split.count)
    target = config.out_dir / f"{split.name}.jsonl"
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(partial, target)
    return target


def synthesize(config: WorldConfig, progress: Progress | None = None) -> dict[str, Path]:
    """Writes every split of a world and returns the row files by split name.

    Without ``progress`` a bar with an estimate is shown. A second call continues where the first was stopped.

    Raises:
        WorldError: a split's folder was made from other settings.
    """
    if progress is not None:
        return {split.name: write_split(config, split, progress) for split in config.splits}
    ready: dict[str, int] = {}
    with ProgressBar("videos", sum(split.count for split in config.splits)) as bar:

        def show(name: str, done: int, total: int) -> None:
            del total
            bar.advance(done - ready.get(name, 0), text=name)
            ready[name] = done

        return {split.name: write_split(config, split, show) for split in config.splits}


@dataclass(frozen=True)
class _Job:
    config: WorldConfig
    split: SplitConfig

    def __call__(self, index: int) -> str:
        config, split = self.config, self.split
        scene = row_scene(config, split, index)
        relative = video_path(split.name, index)
        path = config.out_dir / relative
        if not path.exists():
            frames = render(scene, generator(config.seed, split.name, 2, index), config.size, config.fps)
            encode(frames, path, config.fps, config.crf)
        return json.dumps(to_row(scene, f"{split.name}-{index:06d}", relative), ensure_ascii=False)


def _map(job: _Job, count: int, workers: int) -> Iterator[str]:
    workers = min(workers or len(os.sched_getaffinity(0)), count)
    if workers <= 1:
        yield from map(job, range(count))
        return
    # A clean server process imports this module once and forks the workers, free of the caller's threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(workers) as pool:
        yield from pool.imap(job, range(count), chunksize=4)


def _check_settings(config: WorldConfig, split: SplitConfig, folder: Path) -> None:
    settings = asdict(split) | {
        name: getattr(config, name) for name in ("seed", "size", "fps", "crf", "shuffle_options")
    }
    del settings["count"]
    text = json.dumps(settings, sort_keys=True)
    record = folder / "settings.json"
    if record.exists() and record.read_text(encoding="utf-8") != text:
        raise WorldError(
            f"{folder} was made from other settings than {text}; choose another out_dir or delete it"
        )
    if not record.exists():
        partial = record.with_name(f".{record.name}.{os.getpid()}.part")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, record)
