"""Prompts without videos on disk, for layouts."""

from types import SimpleNamespace
from typing import Any

import torch

VOCAB = 61
MEDIA_TOKEN = 60


def make_prompt(
    before: int, frames: list[int], after: int, seed: int, *, tokens_per_frame: int = 3, axes: int = 1
) -> Any:
    """`before` text tokens, then one run of media tokens per video of so many frames, then `after` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    media = sum(frames) * tokens_per_frame
    total = before + media + after
    token_ids = torch.randint(0, MEDIA_TOKEN, (total,), generator=generator)
    token_ids[before : before + media] = MEDIA_TOKEN
    media_index = torch.full((total,), -1)
    media_index[before : before + media] = torch.arange(media)
    positions = torch.arange(total)
    next_position = total
    if axes == 3:
        # Time advances by frame, the other axes within a frame; text resumes after the largest position.
        place = torch.arange(media)
        grid = torch.stack([place // tokens_per_frame, place % tokens_per_frame, place % tokens_per_frame])
        resume = before + (int(grid.max()) + 1 if media else 0)
        positions = torch.cat(
            [
                torch.arange(before).expand(3, -1),
                grid + before,
                torch.arange(resume, resume + after).expand(3, -1),
            ],
            dim=1,
        )
        next_position = resume + after
    videos = tuple(
        SimpleNamespace(num_frames=n, fingerprint=f"video{seed}.{i}") for i, n in enumerate(frames)
    )
    return SimpleNamespace(
        token_ids=token_ids,
        position_ids=positions,
        media_index=media_index,
        num_media_rows=media,
        tokens_per_frame=tokens_per_frame,
        next_position=next_position,
        videos=videos,
        row=SimpleNamespace(problem_id=f"row{seed}"),
        fingerprint=f"prompt{seed}",
    )


def make_responses(lengths: list[int], seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randint(0, MEDIA_TOKEN, (n,), generator=generator) for n in lengths)
