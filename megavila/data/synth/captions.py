"""Single frames with what they show: the rows that teach a new vision tower and projector to see."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megavila.data.synth.rows import EDGE
from megavila.data.synth.scene import TEMPORAL

QUIET, LAMP_OFF = "nothing", "lamp off"
QUESTION = "What is seen?"


def caption(row: Mapping[str, Any], time: float) -> str | None:
    """What the frame at `time` (seconds) of a row's video shows, in the words of its trace but without what follows from it.

    None at the edges of an event, where little has moved: such frames are no fair question.
    """
    quiet = LAMP_OFF if row["category"] == TEMPORAL else QUIET
    for event in row["events"]:
        if event["start"] <= time < event["end"]:
            if not event["words"]:
                return quiet
            edge = 0.0 if event["kind"] == "intro" else EDGE * (event["end"] - event["start"])
            inside = event["start"] + edge <= time < event["end"] - edge
            return event["words"].split(" -> ")[0] if inside else None
    return quiet


def caption_rows(rows: Iterable[Mapping[str, Any]], per_video: int, seed: int) -> list[dict[str, Any]]:
    """Rows that ask what one frame shows, `per_video` of each video's frames at whole seconds (fewer where it is too short).

    Frames in which something happens are taken before quiet ones; a quarter is quiet where there are enough.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    captions = []
    for row in rows:
        busy, idle = [], []
        for time in range(int(row["duration"])):
            words = caption(row, time)
            if words is not None:
                (idle if words in (QUIET, LAMP_OFF) else busy).append((time, words))
        quiet = min(len(idle), max(per_video // 4, per_video - len(busy)))
        chosen = [busy[i] for i in rng.permutation(len(busy))[: per_video - quiet].tolist()]
        chosen += [idle[i] for i in rng.permutation(len(idle))[:quiet].tolist()]
        captions += [_to_row(row, time, words) for time, words in chosen]
    return captions


def write_captions(source: Path, target: Path, per_video: int, seed: int) -> Path:
    """Write `caption_rows` of the rows in the JSON Lines file `source` to `target`, in the same folder."""
    with source.open(encoding="utf-8") as lines:
        captions = caption_rows(map(json.loads, lines), per_video, seed)
    partial = target.with_name(f".{target.name}.part")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in captions), encoding="utf-8")
    os.replace(partial, target)
    return target


def _to_row(row: Mapping[str, Any], time: int, words: str) -> dict[str, Any]:
    return {
        "problem_id": f"{row['problem_id']}-t{time}",
        "problem": QUESTION,
        "data_type": "video",
        "problem_type": "exact",
        "category": row["category"],
        "reasoning": "",
        "videos": row["videos"],
        "answer": f"<answer>{words}</answer>",
        "num_frames": 1,
        "start": time,
        "end": time + 1e-3,
    }
