"""The specification, with the whole logit matrix in memory."""

import torch
from torch import Tensor


def reference_vocab_partials(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See `vocab_partials`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.to(dtype) @ weight.to(dtype).T / temperature
    here = (target >= 0) & (target < weight.shape[0])
    peak = x.amax(dim=1)
    exponentials = torch.exp(x - peak[:, None])
    picked = x.gather(1, torch.where(here, target, 0)[:, None])[:, 0]
    return peak, torch.stack([exponentials.sum(1), picked.where(here, 0.0), (x * exponentials).sum(1)])


def reference_logit_gradients(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    lse: Tensor,
    entropy: Tensor | None,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
) -> Tensor:
    """See `logit_gradients`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_p = hidden.to(dtype) @ weight.to(dtype).T / temperature - lse[:, None]
    factor = d_logprob[:, None].expand_as(log_p)
    if entropy is not None and d_entropy is not None:
        factor = factor + d_entropy[:, None] * (log_p + entropy[:, None])
    onehot = target[:, None] == torch.arange(weight.shape[0], device=target.device)
    return ((onehot * d_logprob[:, None] - log_p.exp() * factor) / temperature).to(hidden.dtype)
