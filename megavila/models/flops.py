"""Floating-point operations of the model's matrix products: what throughput is measured in."""

from dataclasses import dataclass

import torch
from torch import nn

from megavila.config import ModelConfig
from megavila.models.projector import Projector, tokens_per_frame


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a forward pass, a multiplication and an addition counted as two, over all ranks.

    A backward pass is twice that. Norms, activations, softmax and recomputation are not counted, nor attention
    to keys that a mask hides: these are the operations that the model needs, not those that a kernel spends.
    """

    config: ModelConfig

    def language(self, tokens: int, pairs: int, targets: int) -> float:
        """Decoder and output head.

        tokens: rows that pass through the layers. pairs: (query, key) pairs that attention looks at in each layer and
        head. targets: rows that reach the head.
        """
        language = self.config.language
        assert language is not None and language.vocab_size is not None
        heads, kv_heads, d = language.num_heads, language.num_kv_heads, language.head_dim
        hidden = language.hidden_size
        weights = hidden * (2 * heads + 2 * kv_heads) * d + 3 * hidden * language.ffn_hidden_size
        layer = 2.0 * weights * tokens + 4.0 * heads * d * pairs
        return language.num_layers * layer + 2.0 * hidden * language.vocab_size * targets

    def vision(self, frames: int) -> float:
        """Tower and projector; 0 for a model without."""
        vision = self.config.vision
        if vision is None:
            return 0.0
        patches, hidden = vision.patches_per_side**2, vision.hidden_size
        blocks = vision.num_layers + 1 + vision.feature_layer
        weights = 4 * hidden * hidden + 2 * hidden * vision.intermediate_size
        block = 2.0 * weights * patches + 4.0 * hidden * patches * patches
        embedding = 2.0 * 3 * vision.patch_size**2 * hidden * patches
        return frames * (blocks * block + embedding + self._projector())

    def _projector(self) -> float:
        """Of one frame."""
        assert self.config.vision is not None and self.config.language is not None
        with torch.device("meta"):
            projector = Projector(
                self.config.projector.kind,
                self.config.vision.hidden_size,
                self.config.language.hidden_size,
                dtype=torch.float32,
            )
        weights = sum(m.weight.numel() for m in projector.modules() if isinstance(m, nn.Linear))
        return 2.0 * weights * tokens_per_frame(self.config.vision, self.config.projector)
