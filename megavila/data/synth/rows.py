"""Scenes as LongVideo-Reason rows, and traces re-written for the frames that a model is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megavila.data.synth.scene import Scene

LETTERS = "ABCDEFGH"
EDGE = 0.08
"""An event counts as visible except for this share of its length at either end, where little has moved."""


def to_row(scene: Scene, problem_id: str, video: str) -> dict[str, Any]:
    """One LongVideo-Reason row with the synthetic world's extra facts.

    Args:
        scene: the video's story.
        problem_id: unique in its file.
        video: path of the MP4 file relative to the row file.

    Returns:
        JSON values. Beyond LongVideo-Reason's fields: ``options`` (texts in letter order), ``duration``
        (seconds), ``events`` (start and end in seconds, kind, words, sentence, args), ``conclusion``,
        ``difficulty`` and ``facts``.
    """
    listing = "\n".join(f"{LETTERS[index]}: {option}" for index, option in enumerate(scene.options))
    return {
        "problem_id": problem_id,
        "problem": f"{scene.question}\n{listing}",
        "data_type": "video",
        "problem_type": "multiple choice",
        "category": scene.category,
        "reasoning": reasoning(scene),
        "videos": video,
        "answer": f"<answer>{LETTERS[scene.answer]}</answer>",
        "options": list(scene.options),
        "duration": scene.duration,
        "events": [event.to_json() for event in scene.events],
        "conclusion": scene.conclusion,
        "difficulty": asdict(scene.difficulty),
        "facts": scene.facts,
    }


def reasoning(scene: Scene) -> str:
    """The chain of thought for a reader: one sentence per event with its time in seconds, then the answer."""
    told = [f"At {event.start:.1f} s {event.sentence}." for event in scene.events if event.sentence]
    return " ".join([*told, f"{scene.summary}, so the answer is {LETTERS[scene.answer]}."])


def time_label(seconds: float) -> str:
    """The word that stands for a frame's time: whole seconds, halves up (``t8``)."""
    return f"t{int(seconds + 0.5)}"


def trace(row: Mapping[str, Any], frame_times: Sequence[float]) -> str | None:
    """The compact chain of thought with every time snapped to the first sampled frame that shows the event.

    Args:
        row: a row of :func:`to_row`, or the same read back from JSON.
        frame_times: times in seconds of the frames the model is shown, ascending.

    Returns:
        For example ``t0 ball left ; t8 swap left-middle -> middle ; so middle``, or None where some event
        that matters falls between two sampled frames, so that these frames cannot carry the whole story.
    """
    clauses = []
    for event in row["events"]:
        if not event["words"]:
            continue
        edge = 0.0 if event["kind"] == "intro" else EDGE * (event["end"] - event["start"])
        seen = [time for time in frame_times if event["start"] + edge <= time < event["end"] - edge]
        if not seen:
            return None
        clauses.append(f"{time_label(seen[0])} {event['words']}")
    return " ; ".join([*clauses, row["conclusion"]])
