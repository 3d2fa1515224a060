"""SigLIP vision tower (Zhai et al., 2023) in plain torch; frames do not see each other."""

import torch
import torch.nn.functional as F
from torch import nn

from megavila.config import VisionConfig

# Below this many patches a CPU runs softmax(q kᵀ) v as two batched products about twice as fast as the fused
# kernel, whose backward works in blocks that tiny frames do not fill.
SMALL_FRAME_PATCHES = 64


class SiglipVisionTower(nn.Module):
    """Patch embedding, learned positions and pre-norm blocks.

    `config.feature_layer` counts hidden states as VILA's mm_vision_select_layer and transformers'
    `hidden_states` do: -1 is the output of the last block, before the final LayerNorm; -2 that of the block
    before it; -num_layers - 1 the patch embeddings. Blocks after the chosen state are not built.
    `config.post_norm` adds the final LayerNorm.
    """

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.num_blocks = config.num_layers + 1 + config.feature_layer
        self.num_patches = config.patches_per_side**2
        # (hidden, channels, patch, patch): a convolution whose stride is its size is one product per patch.
        self.patch_weight = nn.Parameter(
            torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size, dtype=dtype)
        )
        self.patch_bias = nn.Parameter(torch.zeros(config.hidden_size, dtype=dtype))
        self.positions = nn.Parameter(torch.empty(self.num_patches, config.hidden_size, dtype=dtype))
        self.blocks = nn.ModuleList(_Block(config, dtype) for _ in range(self.num_blocks))
        self.post_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype) if config.post_norm else None
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (n, 3, image_size, image_size), normalised -> (n, patches, hidden), patches row by row."""
        n, channels = pixels.shape[:2]
        side, patch = self.config.patches_per_side, self.config.patch_size
        pixels = pixels[..., : side * patch, : side * patch]
        patches = pixels.reshape(n, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        hidden = F.linear(
            patches.reshape(n, side * side, channels * patch * patch),
            self.patch_weight.flatten(1),
            self.patch_bias,
        )
        hidden = hidden + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        return hidden if self.post_norm is None else self.post_norm(hidden)


class _Block(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps, dtype=dtype)
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.out = nn.Linear(width, width, dtype=dtype)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps, dtype=dtype)
        self.fc1 = nn.Linear(width, inner, dtype=dtype)
        self.fc2 = nn.Linear(inner, width, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self._attention(self.norm1(hidden))
        return hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden)), approximate="tanh"))

    def _attention(self, hidden: torch.Tensor) -> torch.Tensor:
        n, patches, width = hidden.shape
        q, k, v = self.qkv(hidden).view(n, patches, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if hidden.device.type == "cpu" and patches <= SMALL_FRAME_PATCHES:
            out = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(n, patches, width))
