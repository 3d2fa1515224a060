"""Log-probabilities of given tokens without ever holding a (tokens, vocabulary) matrix."""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from megavila_kernels.linear_logprob import logit_gradients, vocab_partials

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
    backend: str = "auto",
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
        backend: "triton": fused kernels, with no logits in memory in the forward pass and logits kept in fp32;
            "torch"; "auto": Triton on CUDA where it is installed and the dtype is not fp64.

    Returns:
        log-probabilities (n,) and entropies (n,) or None.
    """
    if temperature <= 0:
        raise MegavilaError(
            f"temperature is {temperature}, must be greater than 0: log-probabilities need a distribution"
        )
    if chunk < 1:
        raise MegavilaError(f"chunk is {chunk}, must be at least 1")
    if backend not in ("auto", "torch", "triton"):
        raise MegavilaError(f"log-probability backend is {backend!r}, must be auto, torch or triton")
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
        hidden, weight, targets, temperature, chunk, first, group, with_entropy, _fused(backend, hidden)
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
        fused: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local = targets - first
        owned = (local >= 0) & (local < weight.shape[0])
        if fused:
            peak, sums = vocab_partials(hidden, weight, local, temperature)
        else:
            peak, sums = _vocab_partials(hidden, weight, local, temperature, chunk, with_entropy)
        if group is not None:
            highest = peak.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            shrink = torch.exp(peak - highest)
            sums[0] *= shrink
            sums[2] *= shrink
            owners = torch.cat([sums, owned.to(peak.dtype).unsqueeze(0)])
            dist.all_reduce(owners, group=group)
            sums, owned, peak = owners[:3], owners[3] > 0, highest
        if not bool(owned.all()):
            wrong = targets[~owned][0].item()
            raise MegavilaError(f"target token {wrong} is outside the model's vocabulary")
        lse = peak + sums[0].log()
        logprobs = sums[1] - lse
        entropy = lse - sums[2] / sums[0]
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.settings = (temperature, chunk, first, with_entropy, fused)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk, first, with_entropy, fused = ctx.settings
        d_logprobs, d_entropy = grads
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        local = targets - first
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            d_x = (logit_gradients if fused else _logit_gradients)(
                hidden[rows],
                weight,
                local[rows],
                temperature,
                lse[rows],
                entropy[rows] if with_entropy else None,
                d_logprobs[rows],
                d_entropy[rows] if with_entropy else None,
            )
            if d_hidden is not None:
                torch.mm(d_x, weight, out=d_hidden[rows])
            if d_weight is not None:
                _accumulate(d_weight, d_x.t(), hidden[rows])
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None, None


def _fused(backend: str, hidden: torch.Tensor) -> bool:
    if backend != "auto":
        return backend == "triton"
    if not hidden.is_cuda or hidden.dtype == torch.float64:
        return False
    if find_spec("triton") is None:
        warnings.warn(
            "log-probabilities run on plain torch, which holds a chunk of logits: triton is not installed",
            stacklevel=3,
        )
        return False
    return True


def _vocab_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    local: torch.Tensor,
    temperature: float,
    chunk: int,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `megavila_kernels.linear_logprob.vocab_partials` computes, `chunk` rows of logits at a time."""
    n, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    owned = (local >= 0) & (local < weight.shape[0])
    local = torch.where(owned, local, 0)
    peak = torch.empty(n, dtype=dtype, device=hidden.device)
    sums = torch.zeros(3, n, dtype=dtype, device=hidden.device)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        x = _scaled_logits(hidden[rows], weight, temperature)
        sums[1, rows] = x.gather(1, local[rows, None]).squeeze(1).masked_fill_(~owned[rows], 0.0)
        peak[rows] = x.amax(dim=1)
        exponentials = torch.exp(x - peak[rows, None])
        sums[0, rows] = exponentials.sum(dim=1)
        if with_entropy:
            sums[2, rows] = exponentials.mul_(x).sum(dim=1)
    return peak, sums


def _logit_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    local: torch.Tensor,
    temperature: float,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    d_logprobs: torch.Tensor,
    d_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """What `megavila_kernels.linear_logprob.logit_gradients` computes."""
    shifted = _scaled_logits(hidden, weight, temperature).sub_(lse[:, None])
    probabilities = shifted.exp()
    if entropy is not None and d_entropy is not None:
        factor = shifted.add_(entropy[:, None]).mul_(d_entropy[:, None]).add_(d_logprobs[:, None])
        d_x = probabilities.mul_(factor).neg_()
    else:
        d_x = probabilities.mul_(-d_logprobs[:, None])
    here = ((local >= 0) & (local < weight.shape[0])).nonzero().squeeze(1)
    d_x[here, local[here]] += d_logprobs[here]
    return d_x.div_(temperature).to(hidden.dtype)


def _scaled_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = torch.mm(hidden, weight.t())
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
