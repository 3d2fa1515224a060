"""The videos of the demo: SFT is taught on short ones and a few longer ones, RL and the exam ask about both alike."""

from pathlib import Path

from megavila.data.row import Row
from megavila.data.synth import DifficultyRange, SplitConfig, WorldConfig

TAUGHT_EVENTS = 3
SHORT = DifficultyRange(events=(1, TAUGHT_EVENTS), decoys=(0, 1), slack_seconds=(0, 6))
LONGER = DifficultyRange(events=(TAUGHT_EVENTS + 1, 5), decoys=(0, 1))
ASKED = DifficultyRange(events=(1, 5), decoys=(0, 1))

COUNTS = {"sft": 1700, "sft_longer": 100, "rl": 1250, "exam": 1008}

DARK_SHARE = 0.03


def demo_world(directory: Path, seed: int, quick: bool = False) -> WorldConfig:
    """Splits `sft`, `sft_longer`, `rl` and `exam`; no two share a video.

    quick: a few videos each, enough to walk through every stage.
    """
    counts = {"sft": 24, "sft_longer": 12, "rl": 12, "exam": 12} if quick else COUNTS
    return WorldConfig(
        out_dir=directory,
        splits=(
            SplitConfig("sft", counts["sft"], SHORT, dark_share=DARK_SHARE),
            SplitConfig("sft_longer", counts["sft_longer"], LONGER),
            SplitConfig("rl", counts["rl"], ASKED),
            SplitConfig("exam", counts["exam"], ASKED),
        ),
        seed=seed,
        fps=2,
        crf=32,
    )


def is_longer(row: Row) -> bool:
    """Whether more happens in the row's video than in those that SFT was mostly taught on."""
    return row.extra["difficulty"]["events"] > TAUGHT_EVENTS
