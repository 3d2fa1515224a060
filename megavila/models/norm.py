"""RMSNorm for Megatron-core layers without TransformerEngine."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _RmsNorm(torch.autograd.Function):
    """y = w · x̂ with x̂ = x / rms(x); the backward of torch's own costs twice as much on a CPU.

    dx = (w·dy - x̂ · mean(w · dy · x̂)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normalised, inverse_rms = _normalise(x, eps)
        ctx.save_for_backward(normalised, inverse_rms, weight)
        return normalised * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normalised, inverse_rms, weight = ctx.saved_tensors
        grad = grads[0].to(inverse_rms.dtype)
        product = grad * normalised
        wide = weight.to(inverse_rms.dtype)
        mean = torch.matmul(product, wide).div_(-weight.shape[0]).unsqueeze(-1)
        dx = torch.addcmul(grad * wide, normalised, mean).mul_(inverse_rms)
        d_weight = product.flatten(0, -2).sum(dim=0)
        return dx.to(normalised.dtype), d_weight.to(weight.dtype), None


def _normalise(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) in the type of x, and 1 / rms(x) in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    inverse_rms = mean_square.add_(eps).rsqrt_()
    return (wide * inverse_rms).to(x.dtype), inverse_rms


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich, 2019).

    Megatron-core's own torch norm refuses sequence parallelism. Here the weight is replicated over the
    tensor-parallel group, and with sequence parallelism marked `sequence_parallel`: each rank sees only its
    rows, so its gradient is a part that gradient reduction sums over the group.

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
        """(…, hidden_size) -> the same shape."""
        if hidden.is_cuda:
            return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)
        if torch.is_grad_enabled():
            return _RmsNorm.apply(hidden, self.weight, self.eps)  # type: ignore[return-value]
        return _normalise(hidden, self.eps)[0] * self.weight


class HeadRMSNorm(RMSNorm):
    """RMSNorm of each query or key head: a rank sees only its heads, so the gradient is always a part."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]
