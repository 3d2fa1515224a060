"""RMSNorm for Megatron-core layers without TransformerEngine."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019).

    Megatron-core's own torch norm refuses sequence parallelism. Here the weight is replicated over the tensor-parallel
    group, and with sequence parallelism marked `sequence_parallel`: each rank sees only its rows, so its gradient is a
    part that gradient reduction sums over the group.

    Args:
        config: Megatron `TransformerConfig`; `params_dtype` and `sequence_parallel` are read.
        hidden_size: size of the normalised dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """RMSNorm of each query or key head: a rank sees only its heads, so the gradient is always a part."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]
