"""What a synthetic video is before it has pixels: events in time, a question and the reasoning."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from megavila.data.synth.draw import Canvas
from megavila.runtime.errors import MegavilaError

SPATIAL, TEMPORAL = "Spatial", "Temporal"
GOAL, PLOT = "Goal and Purpose", "Plot and Narrative"
CATEGORIES = (SPATIAL, TEMPORAL, GOAL, PLOT)


class WorldError(MegavilaError, ValueError):
    """Settings of the synthetic world that contradict each other or cannot be met."""


@dataclass(frozen=True)
class Difficulty:
    """How long and how hard one video is.

    Attributes:
        events: what has to be followed: swaps, flashes, turns or thefts. At least 1.
        decoys: happenings that change nothing (a hopping cup, a grey flash, a jump, a meeting).
        distractors: small coloured bits that drift through the picture.
        event_seconds: how long one event is visible.
        gap_seconds: shortest and longest pause between events.
        intro_seconds: how long the opening shot (where the ball is, who has the gem) lasts.
        slack_seconds: idle time spread over the pauses, which makes a video longer without more events.
        drift: camera drift in pixels of the encoded picture (at most 8).
        noise: standard deviation of the sensor noise in grey levels.
    """

    events: int = 3
    decoys: int = 0
    distractors: int = 2
    event_seconds: float = 3.0
    gap_seconds: tuple[float, float] = (1.0, 2.0)
    intro_seconds: float = 3.0
    slack_seconds: float = 0.0
    drift: float = 2.0
    noise: float = 8.0

    def __post_init__(self) -> None:
        if self.events < 1:
            raise WorldError(f"events is {self.events}; a video needs at least 1")
        if self.decoys < 0 or self.distractors < 0:
            raise WorldError(
                f"decoys ({self.decoys}) and distractors ({self.distractors}) cannot be negative"
            )
        low, high = self.gap_seconds
        if not 0 <= low <= high:
            raise WorldError(
                f"gap_seconds is {self.gap_seconds}; it must be (shortest, longest) with 0 <= shortest"
            )
        if self.event_seconds <= 0 or self.intro_seconds <= 0 or self.slack_seconds < 0:
            raise WorldError(
                "event_seconds and intro_seconds must be positive and slack_seconds not negative"
            )
        if not 0 <= self.drift <= 8 or self.noise < 0:
            raise WorldError(
                f"drift is {self.drift} (limit 0 to 8 px) and noise {self.noise} (limit: 0 or more)"
            )


@dataclass(frozen=True)
class Event:
    """One thing that happens.

    Attributes:
        start, end: seconds during which it can be seen.
        kind: "intro", "event" or "decoy".
        words: the compact clause of a trace, such as ``swap left-middle -> right``; empty for a decoy.
        sentence: the same for a reader, without the time; empty for a decoy.
        args: what the painter and an independent check need, JSON values.
    """

    start: float
    end: float
    kind: str
    words: str
    sentence: str
    args: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, times rounded to milliseconds."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return values | {"start": round(self.start, 3), "end": round(self.end, 3)}


Painter = Callable[["Scene", Canvas, float], None]


@dataclass(frozen=True)
class Scene:
    """A video to be rendered with its question.

    Attributes:
        category: one of CATEGORIES.
        question: the question without its options.
        options: option texts in letter order.
        answer: index of the right option.
        conclusion: compact last clause of a trace (``so right``).
        summary: the same for a reader.
        events: in time order, intro first, decoys included.
        duration: whole seconds.
        difficulty: what it was made from.
        facts: further JSON values of the category, such as the question's kind.
        paint: draws the scene at a time (seconds) onto a canvas that holds the background.
    """

    category: str
    question: str
    options: tuple[str, ...]
    answer: int
    conclusion: str
    summary: str
    events: tuple[Event, ...]
    duration: int
    difficulty: Difficulty
    paint: Painter
    facts: dict[str, Any] = field(default_factory=dict)

    def at(self, time: float) -> tuple[Event | None, float]:
        """The event seen at ``time`` and how far it has come (0 to 1); (None, 0) in a pause."""
        for event in self.events:
            if event.start <= time < event.end:
                return event, (time - event.start) / (event.end - event.start)
        return None, 0.0


@dataclass(frozen=True)
class Slot:
    """A stretch of time for one event; ``decoy`` says that nothing of importance happens in it."""

    start: float
    end: float
    decoy: bool


def timeline(difficulty: Difficulty, rng: np.random.Generator) -> tuple[list[Slot], int]:
    """Places events and decoys after the opening shot.

    Returns:
        The slots in time order, each starting half past a second, and the video's duration in whole seconds.
    """
    count = difficulty.events + difficulty.decoys
    decoys = np.zeros(count, dtype=bool)
    decoys[rng.permutation(count)[: difficulty.decoys]] = True
    gaps = rng.uniform(*difficulty.gap_seconds, count + 1)
    gaps += difficulty.slack_seconds * rng.dirichlet(np.ones(count + 1))
    shortest = difficulty.gap_seconds[0]
    slots = []
    time = difficulty.intro_seconds
    for gap, decoy in zip(gaps[:-1].tolist(), decoys.tolist(), strict=True):
        # Half past a second: frames at whole seconds then never catch an event just as it starts or ends.
        start = max(math.floor(time + gap), math.ceil(time + shortest - 0.5)) + 0.5
        time = start + difficulty.event_seconds
        slots.append(Slot(start, time, decoy))
    return slots, math.ceil(time + float(gaps[-1]))
