"""Spatial: the cup game. Three equal cups, one ball; which cup hides it after the swaps?"""

import math

import numpy as np

from megavila.data.synth.draw import BROWN, ORANGE, RED, Canvas
from megavila.data.synth.scene import SPATIAL, Difficulty, Event, Scene, timeline

PLACES = ("left", "middle", "right")
PAIRS = ((0, 1), (1, 2), (0, 2))
_HOME = 1.6


def make(difficulty: Difficulty, rng: np.random.Generator) -> Scene:
    """Draws a cup game with ``difficulty.events`` swaps; the opening shot shows the ball under its cup."""
    slots, duration = timeline(difficulty, rng)
    ball = int(rng.integers(3))
    name = PLACES[ball]
    events = [
        Event(
            0.0,
            difficulty.intro_seconds,
            "intro",
            f"ball {name}",
            f"the ball is under the {name} cup",
            {"ball": ball},
        )
    ]
    for slot in slots:
        if slot.decoy:
            events.append(Event(slot.start, slot.end, "decoy", "", "", {"hop": int(rng.integers(3))}))
            continue
        first, second = PAIRS[int(rng.integers(3))]
        ball = {first: second, second: first}.get(ball, ball)
        pair, name = (PLACES[first], PLACES[second]), PLACES[ball]
        events.append(
            Event(
                slot.start,
                slot.end,
                "event",
                f"swap {pair[0]}_{pair[1]} -> {name}",
                f"the {pair[0]} and {pair[1]} cups change places, so the ball is under the {name} cup",
                {"swap": [first, second]},
            )
        )
    return Scene(
        category=SPATIAL,
        question="A ball is hidden under one of three cups and they move. Which cup hides it at the end?",
        options=PLACES,
        answer=ball,
        conclusion=f"so {name}",
        summary=f"At the end the ball is under the {name} cup",
        events=tuple(events),
        duration=duration,
        difficulty=difficulty,
        paint=paint,
    )


def derive(events: list[Event]) -> int:
    """The ball's place at the end, worked out again from the events' args alone."""
    places = [False, False, False]
    for event in events:
        if "ball" in event.args:
            places[event.args["ball"]] = True
        if "swap" in event.args:
            a, b = event.args["swap"]
            places[a], places[b] = places[b], places[a]
    return places.index(True)


def paint(scene: Scene, canvas: Canvas, time: float) -> None:
    """Cups rest in the middle row; two that swap pass each other, one high, one low, on a half circle."""
    event, progress = scene.at(time)
    spots = {place: (place + 0.5, _HOME) for place in range(3)}
    if event is not None and "swap" in event.args:
        first, second = event.args["swap"]
        # Quick at both ends and slow where the cups pass, so that most sampled frames show who passes whom.
        angle = math.pi / 2 + math.asin(2 * progress - 1)
        centre, radius = (first + second) / 2 + 0.5, (second - first) / 2
        spots[first] = (centre - radius * math.cos(angle), _HOME - 0.95 * math.sin(angle))
        spots[second] = (centre + radius * math.cos(angle), _HOME + 0.8 * math.sin(angle))
    if event is not None and "hop" in event.args:
        place = event.args["hop"]
        spots[place] = (place + 0.5, _HOME - 0.5 * math.sin(math.pi * progress))
    canvas.put("rect", BROWN, 1.5, 2.85, 4.0, 0.5)
    if event is not None and "ball" in event.args:
        place = event.args["ball"]
        spots[place] = (place + 0.5, _HOME - 0.75)
        canvas.put("disc", RED, place + 0.5, _HOME + 0.25, 0.7)
    for x, y in spots.values():
        canvas.put("cup", ORANGE, x, y, 0.8, 0.8)
        canvas.put("rect", BROWN, x, y - 0.2, 0.66, 0.14)
