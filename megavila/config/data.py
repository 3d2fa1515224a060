"""Rows, media and prompts."""

from dataclasses import dataclass
from typing import Literal

from megavila.config.section import Section, knob, require

MAX_FRAMES = 8192


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Which rows, how their columns are called, how videos are sampled and how prompts are written."""

    train: tuple[str, ...] = knob((), "JSON Lines or parquet files to train on.")
    eval: tuple[str, ...] = knob((), "Files to evaluate on.")
    media_dir: str | None = knob(
        None, "Where relative media paths start; null: the directory of the row's file."
    )
    id_key: str = knob("problem_id", "Column of the row's id.")
    prompt_key: str = knob("problem", "Column of the question.")
    answer_key: str = knob("answer", "Column of the answer.")
    video_key: str = knob("videos", "Column of the video path or paths.")
    reasoning_key: str = knob("reasoning", "Column of the chain of thought, for SFT.")
    data_type_key: str = knob("data_type", "Column of the kind of media.")
    problem_type_key: str = knob(
        "problem_type", "Column of the kind of question, which selects the reward's rule."
    )
    category_key: str = knob("category", "Column of the category that scores are reported by.")
    num_frames: int | None = knob(
        None, "Frames sampled uniformly from each video; 32 if fps is not set either."
    )
    fps: float | None = knob(None, "Frames sampled per second of video, up to max_frames.")
    max_frames: int = knob(
        MAX_FRAMES, f"Most frames of one video when sampling by fps; at most {MAX_FRAMES}."
    )
    template: str = knob("longvideo_reason", "Prompt template: the name of a built-in one, or a file.")
    frame_template: str = knob(
        "{media}\n", "Text of one frame; {media} is its tokens and {time} its time in seconds, where wanted."
    )
    transform: str | None = knob(
        None,
        "module:function(row, seed) -> row, applied each time a row is drawn for training: other frame counts, say.",
    )
    on_bad_row: Literal["error", "skip"] = knob(
        "error", "What to do with a malformed row; skipped rows are counted."
    )
    on_bad_media: Literal["error", "skip"] = knob(
        "error", "What to do with a row whose video cannot be read; skipped rows are counted."
    )
    decoder: str = knob("pyav", "Video decoder backend.")
    cache_frames_gib: float = knob(1.0, "Memory for decoded frames on each rank, in GiB; 0: none.")

    def validate(self) -> None:
        self.require_at_least(1, "num_frames", "max_frames")
        self.require_at_least(0, "cache_frames_gib")
        self.require_positive("fps")
        require(
            self.num_frames is None or self.fps is None,
            f"num_frames {self.num_frames} and fps {self.fps} are both set; choose one and set the other to null",
        )
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            require(
                value is None or value <= MAX_FRAMES,
                f"{name} is {value}, must be at most {MAX_FRAMES} frames a video",
            )
        if self.num_frames is None and self.fps is None:
            self.resolve("num_frames", 32)
        require(
            self.frame_template.count("{media}") == 1,
            f"frame_template is {self.frame_template!r}, must contain {{media}} once",
        )
