"""What the MR-SP benchmark trains on: models by size, one real video, rows that each look at another part of it."""

import json
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np

from megavila.data import Row
from megavila.data.tokenizer import build_word_tokenizer

_SMALL_TOWER = {
    "hidden_size": 96,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 256,
    "patch_size": 14,
}
_SO400M = {
    "hidden_size": 1152,
    "num_layers": 27,
    "num_heads": 16,
    "intermediate_size": 4304,
    "patch_size": 14,
}

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {  # walks through the code
        "language": {
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
        },
        "vision": {**_SMALL_TOWER, "image_size": 28},
    },
    "small": {  # 16 tokens a frame, heads in Qwen2-7B's proportion: for two CPU cores
        "language": {
            "hidden_size": 256,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 2,
            "ffn_hidden_size": 704,
        },
        "vision": {**_SMALL_TOWER, "image_size": 112},
    },
    "long": {  # 36 tokens a frame and little else: 250,000 tokens on two CPU cores
        "language": {
            "hidden_size": 64,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "ffn_hidden_size": 128,
        },
        "vision": {
            "hidden_size": 48,
            "num_layers": 1,
            "num_heads": 2,
            "intermediate_size": 96,
            "patch_size": 14,
            "image_size": 168,
        },
    },
    "qwen2-0.5b": {  # Qwen2-0.5B and SigLIP-SO400M, 256 tokens a frame
        "language": {
            "hidden_size": 896,
            "num_layers": 24,
            "num_heads": 14,
            "num_kv_heads": 2,
            "ffn_hidden_size": 4864,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        "vision": {**_SO400M, "image_size": 448},
    },
    "qwen2-1.5b": {
        "language": {
            "hidden_size": 1536,
            "num_layers": 28,
            "num_heads": 12,
            "num_kv_heads": 2,
            "ffn_hidden_size": 8960,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        "vision": {**_SO400M, "image_size": 448},
    },
}
for _model in MODELS.values():
    _model["language"].setdefault("max_position_embeddings", 2**20)

SIDE, RATE = 128, 2


def write_world(directory: Path, frames: int, rows: int) -> None:
    """Write an H.264 video, `rows.jsonl` and a tokenizer.

    Row i looks at `frames` frames from second i on, so that no row's embeddings serve another.
    """
    directory.mkdir(parents=True)
    seconds = -(-frames // RATE) + rows
    noise = np.random.default_rng(0).integers(0, 255, (8, SIDE, SIDE, 3), dtype=np.uint8)
    with av.open(str(directory / "video.mp4"), "w") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"crf": "35", "preset": "veryfast", "g": "16"}
        )
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(seconds * RATE):
            picture = noise[number % 8] // 8 + np.uint8(100 + number % 64)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    question = "What is seen? A: red B: green C: blue"
    lines = [
        json.dumps(
            {
                "problem_id": f"row{number}",
                "problem": question,
                "data_type": "video",
                "problem_type": "multiple choice",
                "videos": "video.mp4",
                "answer": "<answer>A</answer>",
                "start": number,
                "end": number + frames / RATE,
            }
        )
        for number in range(rows)
    ]
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n")
    words = " ".join(f"w{number}" for number in range(200))
    build_word_tokenizer([question, words], directory / "tokenizer")


def reward(row: Row, text: str) -> float:
    """Some number that differs from response to response and is the same on every machine."""
    return zlib.crc32(text.encode()) % 97 / 97
