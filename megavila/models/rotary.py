"""Rotary position embeddings for explicit position ids, one- and three-dimensional.

Megatron-core's rotary embeddings number the rows of the sequence themselves. Packed layouts need the
opposite: several responses restart at the position after their common prompt, and a video's rows carry (time,
height, width) ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from megavila_kernels.rotary import rotate

from megavila.runtime.errors import MegavilaError


class MropeLayout(StrEnum):
    """How the three position axes share the rotary frequencies.

    SECTIONED: contiguous runs of frequencies for time, height, width (Qwen2-VL, Qwen2.5-VL).
    INTERLEAVED: frequencies alternate time, height, width; what is left at the end is time's (Qwen3-VL).
    """

    SECTIONED = "sectioned"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of every token's angles, (tokens, head_dim / 2), fp32; computed once for all layers."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryEmbedding:
    """Angles `position · theta^(-2i / head_dim)` for i in [0, head_dim / 2).

    Su et al., 2021 (RoFormer); with three axes M-RoPE as in Qwen2-VL and Qwen3-VL.

    Args:
        head_dim: size of an attention head, even.
        theta: base of the frequencies.
        mrope_section: frequencies of (time, height, width); None for one-dimensional positions.
        layout: where those frequencies lie.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        mrope_section: Sequence[int] | None = None,
        layout: MropeLayout = MropeLayout.SECTIONED,
    ) -> None:
        if head_dim % 2:
            raise MegavilaError(
                f"rotary embeddings rotate pairs: head_dim {head_dim} is odd; use an even head_dim"
            )
        self.head_dim = head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._frequencies = 1.0 / (theta**exponents)
        self._axis = (
            None if mrope_section is None else _axis_of_frequency(head_dim // 2, mrope_section, layout)
        )

    def __call__(self, position_ids: torch.Tensor) -> RotaryTable:
        """position_ids: (tokens,) or (3, tokens), integer. A one-dimensional id counts for all three axes."""
        frequencies = self._frequencies.to(position_ids.device)
        positions = position_ids.to(torch.float32)
        if position_ids.dim() == 1:
            angles = positions[:, None] * frequencies
        elif self._axis is None:
            raise MegavilaError(
                f"position ids of shape {tuple(position_ids.shape)} given to a model without M-RoPE; "
                "set language.mrope_section or pass (tokens,) ids"
            )
        else:
            # Contiguous, so that no layer has to copy the table.
            angles = positions[self._axis.to(position_ids.device)].t().contiguous() * frequencies
        return RotaryTable(cos=angles.cos(), sin=angles.sin())


def _axis_of_frequency(count: int, section: Sequence[int], layout: MropeLayout) -> torch.Tensor:
    """(count,) tensor with 0, 1 or 2: the axis (time, height, width) whose position turns each frequency."""
    if len(section) != 3 or sum(section) != count:
        raise MegavilaError(
            f"mrope_section {list(section)} must be three counts of frequencies that sum to head_dim / 2 = {count}"
        )
    if layout is MropeLayout.SECTIONED:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(list(section)))
    axis = torch.zeros(count, dtype=torch.long)
    for index in (1, 2):
        axis[index : 3 * section[index] : 3] = index
    return axis


def apply_rotary(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Turns queries or keys (tokens, heads, head_dim) by their tokens' angles."""
    return rotate(x, table.cos, table.sin)
