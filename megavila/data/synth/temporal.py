"""Temporal: a lamp flashes in colours. How often one colour came, or what came right before the star."""

from dataclasses import replace

import numpy as np

from megavila.data.synth.draw import BLACK, GREY, NAMED, WHITE, Canvas
from megavila.data.synth.scene import TEMPORAL, Difficulty, Event, Scene, timeline

COLOURS = ("red", "green", "blue")
COUNTS = ("1", "2", "3")


def make(difficulty: Difficulty, rng: np.random.Generator) -> Scene:
    """Draws a counting or an ordering question, each half of the time.

    Counting: between 1 and 3 flashes of the asked colour among ``difficulty.events + 2``. Ordering: a star
    appears among as many, after at least one, and the colour right before it is asked for. Flashes are
    easier to follow than swaps: there are two more of them, each two thirds of ``event_seconds`` long.
    """
    return _count(difficulty, rng) if rng.random() < 0.5 else _order(difficulty, rng)


def _intro(difficulty: Difficulty) -> Event:
    return Event(0.0, difficulty.intro_seconds, "intro", "lamp off", "the lamp is off", {"off": True})


def _count(difficulty: Difficulty, rng: np.random.Generator) -> Scene:
    number = difficulty.events + 2
    slots, duration = timeline(_with_events(difficulty, number), rng)
    asked, answer = int(rng.integers(3)), int(rng.integers(3))
    others = [colour for colour in range(3) if colour != asked]
    flashes = [asked] * (answer + 1) + [others[int(rng.integers(2))] for _ in range(number - answer - 1)]
    flashes = [flashes[index] for index in rng.permutation(number)]
    events, seen = [_intro(difficulty)], 0
    for slot in slots:
        if slot.decoy:
            events.append(Event(slot.start, slot.end, "decoy", "", "", {"flash": "grey"}))
            continue
        colour = flashes.pop(0)
        seen += colour == asked
        name = COLOURS[colour]
        sentence = f"the lamp flashes {name}, so {COLOURS[asked]} has come {seen} times so far"
        events.append(Event(slot.start, slot.end, "event", f"{name} -> {seen}", sentence, {"flash": name}))
    return Scene(
        category=TEMPORAL,
        question=f"How many times does the lamp flash {COLOURS[asked]}?",
        options=COUNTS,
        answer=answer,
        conclusion=f"so {COUNTS[answer]}",
        summary=f"The lamp flashes {COLOURS[asked]} {COUNTS[answer]} times",
        events=tuple(events),
        duration=duration,
        difficulty=difficulty,
        paint=paint,
        facts={"kind": "count", "asked": COLOURS[asked]},
    )


def _order(difficulty: Difficulty, rng: np.random.Generator) -> Scene:
    number = difficulty.events + 2
    slots, duration = timeline(_with_events(difficulty, number), rng)
    star = int(rng.integers(max(1, number // 2), number))
    events = [_intro(difficulty)]
    name, answer, index = "", 0, 0
    for slot in slots:
        if slot.decoy:
            events.append(Event(slot.start, slot.end, "decoy", "", "", {"flash": "grey"}))
            continue
        if index == star:
            answer = COLOURS.index(name)
            sentence = f"the star appears, and the flash before it was {name}"
            events.append(
                Event(slot.start, slot.end, "event", f"star -> {name}", sentence, {"flash": "star"})
            )
        else:
            name = COLOURS[int(rng.integers(3))]
            words, sentence = f"{name}", f"the lamp flashes {name}"
            events.append(Event(slot.start, slot.end, "event", words, sentence, {"flash": name}))
        index += 1
    return Scene(
        category=TEMPORAL,
        question="Which colour does the lamp flash right before the star appears?",
        options=COLOURS,
        answer=answer,
        conclusion=f"so {COLOURS[answer]}",
        summary=f"The last flash before the star is {COLOURS[answer]}",
        events=tuple(events),
        duration=duration,
        difficulty=difficulty,
        paint=paint,
        facts={"kind": "order", "asked": "star"},
    )


def _with_events(difficulty: Difficulty, number: int) -> Difficulty:
    return replace(difficulty, events=number, event_seconds=difficulty.event_seconds * 2 / 3)


def derive(events: list[Event], facts: dict[str, str]) -> str:
    """The answer's text, worked out again from the events' args and the question's facts."""
    flashes = [event.args["flash"] for event in events if event.args.get("flash", "grey") != "grey"]
    if facts["kind"] == "count":
        return str(flashes.count(facts["asked"]))
    return flashes[flashes.index("star") - 1]


def paint(scene: Scene, canvas: Canvas, time: float) -> None:
    """A black lamp in the middle of the picture; its face shows the flash, or a white star."""
    event, _ = scene.at(time)
    canvas.put("rect", BLACK, 1.5, 1.5, 2.2, 2.2)
    flash = event.args.get("flash") if event is not None else None
    if flash == "star":
        canvas.put("star", WHITE, 1.5, 1.5, 2.1)
    elif flash is not None:
        canvas.put("disc", GREY if flash == "grey" else NAMED[flash], 1.5, 1.5, 1.9)
