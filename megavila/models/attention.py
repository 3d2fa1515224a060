"""The attention slot of every decoder layer, and what a forward pass must say about its tokens."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megavila.models.rotary import RotaryTable, apply_rotary


class AttentionStrategy(Protocol):
    """Which token sees which, and where keys and values come from.

    Training layouts, context parallelism and KV caches are strategies. Under activation recomputation a layer
    is run twice, so a training strategy must give the same answer each time it is called for a layer.
    """

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """layer: counted from 0. q: (t, heads, d); k, v: (t, kv_heads, d), rotated; returns (t, heads, d).

        Head counts are those of this tensor-parallel rank; query head h reads key head
        h // (heads / kv_heads).
        """
        ...


@dataclass(frozen=True)
class AttentionContext:
    """Positions and visibility of one packed run of tokens.

    position_ids: (t,) or, with M-RoPE, (3, t).
    attend: the attention strategy.
    """

    position_ids: torch.Tensor
    attend: AttentionStrategy
    qkv_format: str = "thd"

    @property
    def num_tokens(self) -> int:
        return self.position_ids.shape[-1]


@dataclass(frozen=True)
class RotatedContext:
    """What reaches the layers as Megatron's `packed_seq_params`: the context and its angles."""

    context: AttentionContext
    rotary: RotaryTable
    qkv_format: str = "thd"


class PackedAttention(nn.Module):
    """Megatron-core `core_attention`: rotates q and k and hands them to the context's strategy.

    Rows that sequence parallelism appended to make the token count divisible are cut off before attention and
    come back as zeros, so a strategy never sees them.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.layer = layer_number - 1
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: RotatedContext,
    ) -> torch.Tensor:
        """query: (padded t, heads, d); key, value: (padded t, kv_heads, d); returns (padded t, heads, d)."""
        context = packed_seq_params.context
        rows, tokens = query.shape[0], context.num_tokens
        if rows > tokens:
            query, key, value = query[:tokens], key[:tokens], value[:tokens]
        query = apply_rotary(query, packed_seq_params.rotary)
        key = apply_rotary(key, packed_seq_params.rotary)
        out = context.attend(self.layer, query, key, value, self.scale)
        if rows > tokens:
            out = torch.cat([out, out.new_zeros(rows - tokens, *out.shape[1:])])
        return out
