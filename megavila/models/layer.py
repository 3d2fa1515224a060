"""One decoder layer: Megatron-core's modules joined by a pre-norm residual block and nothing else."""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer


class DecoderLayer(TransformerLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Megatron-core's own forward walks through offloading contexts, an empty cross attention and dropout
    wrappers at every layer, which a decoding step over a few hundred tokens notices. It also turns gradients
    on inside the residual additions. Construction, parameters and checkpoint names are the parent's.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: Any,
        **unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """(tokens / SP, 1, hidden) -> (the same shape, None for Megatron's cross-attention context)."""
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=None, packed_seq_params=packed_seq_params
        )
        hidden_states = hidden_states + attended
        transformed, _ = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + transformed, None
