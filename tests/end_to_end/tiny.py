"""A world small enough for whole training runs in a test: seconds of video, a model of 20k weights."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np

from megavila.config import GrpoRunConfig, SftRunConfig, build
from megavila.data.tokenizer import build_word_tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
SIDE = 32


def write_video(path: Path, colour: tuple[int, int, int], *, frames: int = 12, seed: int = 0) -> None:
    """A square of `colour` that moves over a noisy grey ground, as H.264."""
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"threads": "1"})
        stream.width = stream.height = 2 * SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            image = generator.integers(90, 130, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
            left = 2 + 3 * number
            image[20:44, left : left + 16] = colour
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_audio_only(path: Path) -> None:
    """An MP4 file without a video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def write_world(directory: Path, rows: int = 6) -> Path:
    """Write videos, rows and a tokenizer under `directory`; returns the file of rows."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    records = []
    for number in range(rows):
        colour = names[number % len(names)]
        write_video(directory / f"{number}.mp4", COLOURS[colour], frames=9 + number, seed=number)
        records.append(
            {
                "problem_id": f"row{number}",
                "problem": "Which colour moves? A: red B: green C: blue",
                "data_type": "video",
                "problem_type": "multiple choice",
                "reasoning": f"the square moves right and it is {colour}" + " so" * (number % 3),
                "videos": f"{number}.mp4",
                "answer": f"<answer>{'ABC'[number % 3]}</answer>",
                "category": "Spatial",
            }
        )
    path = directory / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [record["problem"] + " " + record["reasoning"] for record in records]
    build_word_tokenizer([*texts, "A B C"], directory / "tokenizer")
    return path


def settings(world: Path, name: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """The config of a run called `name` as nested dictionaries, with `sections` merged in."""
    merged: dict[str, Any] = {
        "run": {"name": name, "output_dir": str(world / "runs"), "steps": 3, "seed": 5, "device": "cpu"},
        "model": {
            "tokenizer": str(world / "tokenizer"),
            "init_std": 0.2,
            "language": {
                "hidden_size": 24,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "ffn_hidden_size": 40,
            },
            "vision": {
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 24,
                "image_size": SIDE,
                "patch_size": 8,
            },
        },
        "data": {"train": [str(world / "train.jsonl")], "num_frames": 3, "template": "compact"},
        "optimizer": {"lr": 3e-3, "clip_grad": 1.0, "weight_decay": 0.01, "schedule": "cosine"},
        "checkpoint": {"every": 0, "save_final": False},
    }
    for key, section in sections.items():
        merged[key] = {**merged.get(key, {}), **section}
    return merged


def sft_config(world: Path, name: str, /, **sections: dict[str, Any]) -> SftRunConfig:
    sections["sft"] = {"batch_size": 4, "max_tokens_per_microbatch": 120, **sections.get("sft", {})}
    return build(SftRunConfig, settings(world, name, **sections))


def grpo_config(world: Path, name: str, /, **sections: dict[str, Any]) -> GrpoRunConfig:
    sections["rollout"] = {"group_size": 4, "max_response_tokens": 6, **sections.get("rollout", {})}
    sections["grpo"] = {
        "prompts_per_step": 4,
        "max_tokens_per_microbatch": 160,
        **sections.get("grpo", {}),
    }
    # The untrained model writes no answer; this rewards what it does write, so that groups differ.
    sections["reward"] = {
        "accuracy_weight": 0.0,
        "format_weight": 0.0,
        "functions": ["tests.end_to_end.tiny:reward_words"],
        "function_weights": [1.0],
        **sections.get("reward", {}),
    }
    return build(GrpoRunConfig, settings(world, name, **sections))


retold: list[str] = []
"""The rows that `retell` has been asked about in this process."""


def retell(row: Any, timestamps: Any) -> str:
    """A row's own reasoning, as a hook."""
    retold.append(row.problem_id)
    return row.reasoning


scored: list[str] = []
"""The row of each response that `reward_words` has scored in this process."""


def reward_words(row: Any, text: str) -> float:
    """Something that differs between random responses, and between rows."""
    scored.append(row.problem_id)
    words = text.split()
    return sum(len(word) % 3 for word in words) / 4 + (row.answer in words)
