"""The videos of the demo: short ones to be taught on, longer ones to be trained and examined on."""

from pathlib import Path

from megavila.data.synth import DifficultyRange, SplitConfig, WorldConfig

SHORT = DifficultyRange(events=(1, 3), decoys=(0, 1), slack_seconds=(0, 6))
LONG = DifficultyRange(events=(2, 6), decoys=(0, 1))
EXAM = DifficultyRange(events=(4, 6), decoys=(0, 1))

COUNTS = {"sft": 2000, "rl": 1000, "exam": 1008, "easy": 252}

DARK_SHARE = 0.03

TAUGHT = "videos with 1 to 3 events that matter"
EXAMINED = "videos with 4 to 6 events, more than SFT ever saw"


def demo_world(directory: Path, seed: int, quick: bool = False) -> WorldConfig:
    """Splits `sft`, `rl`, `exam` and `easy` (new videos like those of `sft`); no two share a video.

    quick: a few videos each, enough to walk through every stage.
    """
    counts = {"sft": 24, "rl": 12, "exam": 12, "easy": 12} if quick else COUNTS
    return WorldConfig(
        out_dir=directory,
        splits=(
            SplitConfig("sft", counts["sft"], SHORT, dark_share=DARK_SHARE),
            SplitConfig("rl", counts["rl"], LONG),
            SplitConfig("exam", counts["exam"], EXAM),
            SplitConfig("easy", counts["easy"], SHORT),
        ),
        seed=seed,
        fps=2,
        crf=32,
    )
