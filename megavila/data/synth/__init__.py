"""A world of videos with checkable questions in LongVideo-Reason's four categories."""

from megavila.data.synth.dataset import (
    DifficultyRange,
    Progress,
    SplitConfig,
    WorldConfig,
    make_scene,
    row_scene,
    synthesize,
    write_split,
)
from megavila.data.synth.encode import encode, render
from megavila.data.synth.rows import time_label, to_row, trace
from megavila.data.synth.scene import CATEGORIES, Difficulty, Event, Scene

__all__ = [
    "CATEGORIES",
    "Difficulty",
    "DifficultyRange",
    "Event",
    "Progress",
    "Scene",
    "SplitConfig",
    "WorldConfig",
    "encode",
    "make_scene",
    "render",
    "row_scene",
    "synthesize",
    "time_label",
    "to_row",
    "trace",
    "write_split",
]
