"""Log-probabilities of given tokens without ever holding a (tokens, vocabulary) matrix."""

from typing import Any

import torch
import torch.distributed as dist

from megavila.runtime.errors import MegavilaError
from megavila.runtime.topology import Topology


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    topology: Topology,
    temperature: float = 1.0,
    chunk: int = 1024,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-softmax of `hidden @ weightᵀ / temperature` at `targets`, in fp32 (fp64 for fp64 inputs).

    Rows are processed `chunk` at a time and their logits computed again in the backward pass, so memory is
    O(chunk · vocab / TP). The gradient of `hidden` is this rank's share, from its part of the vocabulary: the
    gather at the end of `LanguageModel.forward` sums the shares over the tensor-parallel group.

    Args:
        hidden: (n, hidden), the same on every tensor-parallel rank.
        weight: this rank's rows of the output embedding, as `LanguageModel.output_weight` gives them.
        targets: (n,) token ids.
        topology: supplies the tensor-parallel group.
        temperature: > 0.
        chunk: rows whose logits exist at one time.
        with_entropy: also return the entropy of each row's distribution; differentiable.

    Returns:
        log-probabilities (n,) and entropies (n,) or None.
    """
    if temperature <= 0:
        raise MegavilaError(
            f"temperature is {temperature}, must be greater than 0: log-probabilities need a distribution"
        )
    if chunk < 1:
        raise MegavilaError(f"chunk is {chunk}, must be at least 1")
    if hidden.shape[0] != targets.shape[0]:
        raise MegavilaError(f"{hidden.shape[0]} hidden rows but {targets.shape[0]} targets")
    group = topology.tensor_group if topology.tensor > 1 else None
    first = 0
    if group is not None:
        # Ranks before the padded end of the vocabulary all hold this many rows.
        rows = torch.tensor([weight.shape[0]], device=weight.device)
        dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=group)
        first = topology.tensor_rank * int(rows.item())
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[misc]
        hidden, weight, targets, temperature, chunk, first, group, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """With x = logits / T, p = softmax(x), lse = log Σ exp x, H the entropy:

    d logp_target / dx = onehot - p and dH / dx = -p (x - lse + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        first: int,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        peak = torch.empty(n, dtype=dtype, device=hidden.device)
        # Sums over this rank's vocabulary: exp(x - peak), x of the target if it is here, x · exp(x - peak).
        sums = torch.zeros(3, n, dtype=dtype, device=hidden.device)
        local = targets - first
        owned = (local >= 0) & (local < weight.shape[0])
        local = torch.where(owned, local, 0)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            x = _scaled_logits(hidden[rows], weight, temperature)
            sums[1, rows] = x.gather(1, local[rows, None]).squeeze(1).masked_fill_(~owned[rows], 0.0)
            peak[rows] = x.amax(dim=1)
            exponentials = torch.exp(x - peak[rows, None])
            sums[0, rows] = exponentials.sum(dim=1)
            if with_entropy:
                sums[2, rows] = exponentials.mul_(x).sum(dim=1)
        if group is not None:
            highest = peak.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            shrink = torch.exp(peak - highest)
            sums[0] *= shrink
            sums[2] *= shrink
            owners = torch.cat([sums, owned.to(dtype).unsqueeze(0)])
            dist.all_reduce(owners, group=group)
            sums, owned, peak = owners[:3], owners[3] > 0, highest
        if not bool(owned.all()):
            wrong = targets[~owned][0].item()
            raise MegavilaError(f"target token {wrong} is outside the model's vocabulary")
        lse = peak + sums[0].log()
        logprobs = sums[1] - lse
        entropy = lse - sums[2] / sums[0]
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.settings = (temperature, chunk, first, with_entropy)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk, first, with_entropy = ctx.settings
        d_logprobs, d_entropy = grads
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        local = targets - first
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            x = _scaled_logits(hidden[rows], weight, temperature)
            shifted = x.sub_(lse[rows, None])
            probabilities = shifted.exp()
            if with_entropy:
                factor = (
                    shifted.add_(entropy[rows, None]).mul_(d_entropy[rows, None]).add_(d_logprobs[rows, None])
                )
                d_x = probabilities.mul_(factor).neg_()
            else:
                d_x = probabilities.mul_(-d_logprobs[rows, None])
            here = ((local[rows] >= 0) & (local[rows] < weight.shape[0])).nonzero().squeeze(1)
            d_x[here, local[rows][here]] += d_logprobs[rows][here]
            d_x = d_x.div_(temperature).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_x, weight, out=d_hidden[rows])
            if d_weight is not None:
                _accumulate(d_weight, d_x.t(), hidden[rows])
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def _scaled_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = torch.mm(hidden, weight.t())
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
