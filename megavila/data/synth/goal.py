"""Goal and Purpose: a traveller heads for one of three gates; the camera follows, so lanes are inferred.

The road runs around a tower, so its lanes form a ring: right of the right lane is the left one. No single turn tells the
lane then, and all of them have to be followed.
"""

import math

import numpy as np

from megavila.data.synth.draw import BLACK, BLUE, GREEN, GREY, PURPLE, WHITE, YELLOW, Canvas
from megavila.data.synth.scene import GOAL, Difficulty, Event, Scene, timeline

LANES = ("left", "middle", "right")


def make(difficulty: Difficulty, rng: np.random.Generator) -> Scene:
    """Draws a trip with ``difficulty.events`` lane changes; it ends before the traveller is at a gate."""
    slots, duration = timeline(difficulty, rng)
    lane = int(rng.integers(3))
    name = LANES[lane]
    events = [
        Event(
            0.0,
            difficulty.intro_seconds,
            "intro",
            f"lane {name}",
            f"the traveller starts in the {name} lane, straight below the {name} gate",
            {"lane": lane},
        )
    ]
    for slot in slots:
        if slot.decoy:
            events.append(Event(slot.start, slot.end, "decoy", "", "", {"jump": True}))
            continue
        step = (-1, 1)[int(rng.integers(2))]
        lane = (lane + step) % 3
        side, name = ("left", "right")[step > 0], LANES[lane]
        sentence = f"the traveller moves one lane to the {side}, now in line with the {name} gate"
        events.append(
            Event(slot.start, slot.end, "event", f"turn {side} -> {name}", sentence, {"step": step})
        )
    return Scene(
        category=GOAL,
        question="A traveller walks towards three gates on a round road, changing lanes. Which gate will it be?",
        options=LANES,
        answer=lane,
        conclusion=f"so {name}",
        summary=f"Before arriving, the traveller is heading for the {name} gate",
        events=tuple(events),
        duration=duration,
        difficulty=difficulty,
        paint=paint,
    )


def derive(events: list[Event]) -> int:
    """The lane at the end: the starting lane plus all steps, around the ring."""
    return sum(event.args.get("lane", 0) + event.args.get("step", 0) for event in events) % 3


def paint(scene: Scene, canvas: Canvas, time: float) -> None:
    """Opening: three gates, the traveller in a lane. Then the camera follows and shows only turns."""
    event, progress = scene.at(time)
    if event is not None and event.kind == "intro":
        for lane in range(3):
            canvas.put("rect", PURPLE, lane + 0.5, 0.5, 0.9, 0.9)
            canvas.put("rect", BLACK, lane + 0.5, 0.65, 0.45, 0.6)
        canvas.person(BLUE, event.args["lane"] + 0.5, 2.2)
        return
    canvas.put("rect", GREY, 1.5, 1.5, 1.3, 4.0)
    for line in range(4):
        canvas.put("rect", WHITE, 1.5, (line + time * 0.7) % 4 - 0.5, 0.12, 0.5)
    sway, lift = 0.0, 0.0
    if event is not None and "step" in event.args:
        side = event.args["step"]
        sway = 0.45 * side * math.sin(math.pi * progress)
        canvas.put(
            "right" if side > 0 else "left", YELLOW if side > 0 else GREEN, 1.5 + 0.98 * side, 1.5, 0.95, 1.3
        )
    if event is not None and "jump" in event.args:
        lift = 0.5 * math.sin(math.pi * progress)
    canvas.person(BLUE, 1.5 + 0.5 * sway, 1.6 - lift)
