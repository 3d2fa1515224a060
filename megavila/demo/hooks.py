"""What the demo's configs name as functions: rows varied from visit to visit, and reasoning for the frames shown."""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from megavila.data.row import Row
from megavila.data.synth import trace

FEWER_FRAMES = 0.1
"""Share of visits that show a video with fewer frames than one a second."""
LATEST_START = 16
"""Videos are taught as if they began up to so many seconds into a recording: more time labels are met."""

_TIME = re.compile(r"\bt(\d+)\b")


def vary(row: Row, seed: int) -> Row:
    """The row with another start on the clock, and now and then with fewer frames."""
    chance = random.Random(seed)
    extra = {**row.extra, "time_offset": chance.randint(0, LATEST_START)}
    if chance.random() < FEWER_FRAMES and "num_frames" not in extra:
        seconds = int(row.extra["duration"])
        extra["num_frames"] = chance.randint(max(4, seconds // 2), seconds)
    return replace(row, extra=extra)


def reasoning(row: Row, timestamps: Sequence[float]) -> str | None:
    """The compact trace that the frames at `timestamps` support, in the clock of the prompt; None if they miss an event."""
    text = trace(row.extra, timestamps)
    if text is None:
        return None
    start = int(row.extra.get("time_offset") or 0)
    return _TIME.sub(lambda match: f"t{int(match[1]) + start}", text)
