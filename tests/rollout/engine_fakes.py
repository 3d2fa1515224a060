"""Prompts and a tokenizer without videos or files, for tests of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from megavila.data.prompt import Prompt

VOCAB = 203


@dataclass(frozen=True)
class Pieces:
    """A tokenizer whose token i is the text `pieces[i]`: one odd character each, unless replaced."""

    eos_id: int = VOCAB - 1
    replaced: tuple[tuple[int, str], ...] = ()
    vocab_size: int = VOCAB
    pad_id: int = 0
    directory: Path | None = None

    def decode(self, ids: Sequence[int]) -> str:
        replaced = dict(self.replaced)
        return "".join(replaced.get(i, chr(0x100 + i)) for i in ids)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def token_id(self, token: str) -> int:
        raise NotImplementedError


def make_prompt(
    length: int, seed: int, media: int = 0, position_axes: int = 1
) -> tuple[Prompt, Tensor | None]:
    """A prompt of `length` random tokens, `media` of them rows of video (in shuffled order), and those rows
    (64 wide).
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, VOCAB, (length,), generator=generator)
    media_index = torch.full((length,), -1)
    if media:
        places = torch.randperm(length, generator=generator)[:media]
        media_index[places] = torch.randperm(media, generator=generator)
    positions = torch.arange(length)
    if position_axes == 3:
        positions = torch.stack([positions, positions // 2, positions % 5])
    prompt: Any = SimpleNamespace(
        token_ids=token_ids,
        position_ids=positions,
        media_index=media_index,
        num_media_rows=media,
        next_position=int(positions.max()) + 1,
        row=SimpleNamespace(problem_id=f"fake-{seed}"),
    )
    rows = 0.1 * torch.randn(media, 64, generator=generator) if media else None
    return cast(Prompt, prompt), rows
