"""Plot and Narrative: three people, one gem, tricks told over several scenes. Who has the gem at the end?"""

import math

import numpy as np

from megavila.data.synth.draw import BLACK, BROWN, NAMED, PURPLE, WHITE, YELLOW, Canvas
from megavila.data.synth.scene import PLOT, Difficulty, Event, Scene, timeline

PEOPLE = ("red", "green", "blue")


def make(difficulty: Difficulty, rng: np.random.Generator) -> Scene:
    """Draws a story of ``difficulty.events`` tricks: somebody takes another's bag and leaves the own one in its place.

    So the last trick alone says nothing about who has the gem, and all of them have to be followed.
    """
    slots, duration = timeline(difficulty, rng)
    owner = int(rng.integers(3))
    name = PEOPLE[owner]
    events = [
        Event(
            0.0,
            difficulty.intro_seconds,
            "intro",
            f"gem {name}",
            f"the person in {name} shows a gem and puts it into a bag",
            {"owner": owner},
        )
    ]
    for slot in slots:
        thief, victim = rng.permutation(3)[:2].tolist()
        if slot.decoy:
            events.append(Event(slot.start, slot.end, "decoy", "", "", {"meet": [thief, victim]}))
            continue
        owner = {thief: victim, victim: thief}.get(owner, owner)
        name = PEOPLE[owner]
        taken, robbed = PEOPLE[thief], PEOPLE[victim]
        pair = "_".join(PEOPLE[person] for person in sorted((thief, victim)))
        events.append(
            Event(
                slot.start,
                slot.end,
                "event",
                f"trick {pair} -> {name}",
                f"{taken} takes the bag of {robbed} and leaves the own one, so the gem is with {name}",
                {"take": [thief, victim]},
            )
        )
    return Scene(
        category=PLOT,
        question="Three people trick each other out of their bags, leaving their own. Who has the gem at the end?",
        options=PEOPLE,
        answer=owner,
        conclusion=f"so {name}",
        summary=f"At the end {name} has the gem",
        events=tuple(events),
        duration=duration,
        difficulty=difficulty,
        paint=paint,
    )


def derive(events: list[Event]) -> int:
    """Who has the gem at the end, from what is in every bag: each trick exchanges two bags."""
    bags = ["coin 0", "coin 1", "coin 2"]
    for event in events:
        if "owner" in event.args:
            bags[event.args["owner"]] = "gem"
        if "take" in event.args:
            thief, victim = event.args["take"]
            bags[thief], bags[victim] = bags[victim], bags[thief]
    return bags.index("gem")


def paint(scene: Scene, canvas: Canvas, time: float) -> None:
    """The owner alone; then thief left, victim right, the bag wandering left between them; a curtain between scenes."""
    event, progress = scene.at(time)
    if event is None:
        canvas.put("rect", PURPLE, 0.4, 1.5, 0.8, 4.0)
        canvas.put("rect", PURPLE, 2.6, 1.5, 0.8, 4.0)
        return
    canvas.put("rect", WHITE, 1.5, 2.9, 4.0, 0.4)
    if event.kind == "intro":
        canvas.person(NAMED[PEOPLE[event.args["owner"]]], 1.5, 1.9)
        canvas.put("gem", YELLOW, 1.5, 0.5, 0.85)
        return
    left, right = event.args["take" if "take" in event.args else "meet"]
    canvas.person(NAMED[PEOPLE[left]], 0.5, 1.7)
    canvas.person(NAMED[PEOPLE[right]], 2.5, 1.7)
    if "take" in event.args:
        canvas.put("rect", BLACK, 1.5, 1.5, 0.9, 0.12)
        canvas.put("disc", BROWN, 1.5 + 0.25 * math.cos(math.pi * progress), 1.75, 0.75)
