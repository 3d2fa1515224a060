"""The clipped policy loss of GRPO: equation 1 of "Scaling RL to Long Videos" (arXiv 2507.07966).

Every loss here is a weighted sum over response tokens. The weights hold the normalisation of the *whole*
step, so the sum over micro-batches and over data-parallel ranks of these losses is the loss, whatever the
split.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megavila.rl.importance import importance_ratios, importance_weights
from megavila.runtime.errors import MegavilaError


class LossError(MegavilaError):
    """A loss was configured in a way that has no meaning."""


@dataclass(frozen=True)
class StepSize:
    """Denominators of one optimizer step, over all micro-batches and all data-parallel ranks."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class PolicyLossOptions:
    """Hyper-parameters of equation 1: ratios are clipped to ``[1 - clip_low, 1 + clip_high]``; its beta."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    aggregation: str = "sequence_mean"
    importance: str = "none"
    """How the loss is corrected for the engine that sampled; see `importance_ratios`."""
    importance_cap: float = 2.0


@dataclass(frozen=True)
class PolicyStats:
    """Sums over response tokens, ready to be added up over micro-batches and ranks; detached fp64 scalars.

    ``ratio_max`` is the exception: it is joined by a maximum.
    """

    tokens: Tensor
    loss: Tensor
    kl: Tensor
    clipped: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    entropy: Tensor
    ratio: Tensor
    importance: Tensor
    importance_capped: Tensor
    ratio_max: Tensor

    def __add__(self, other: "PolicyStats") -> "PolicyStats":
        joined = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        joined["ratio_max"] = torch.maximum(self.ratio_max, other.ratio_max)
        return PolicyStats(**joined)


def token_weights(
    response_of_target: Tensor, response_lengths: Tensor, size: StepSize, aggregation: str
) -> Tensor:
    """Return the weight of each response token in the loss of the step.

    ``sequence_mean`` is equation 1 with its expectation over questions: the mean over sequences of the mean
    over their tokens (TRL's ``grpo``). ``token_mean`` weighs all tokens of the step alike (TRL's ``dapo``).

    Args:
        response_of_target: (n,) which response a token belongs to.
        response_lengths: (responses,) tokens of the whole response, also where only a part of it is at hand.
        size: sequences and tokens of the whole step.

    Returns:
        (n,) float32.
    """
    if aggregation == "token_mean":
        return torch.full_like(response_of_target, 1.0 / max(size.tokens, 1), dtype=torch.float32)
    if aggregation != "sequence_mean":
        raise LossError(f"loss aggregation {aggregation!r} is unknown; use 'sequence_mean' or 'token_mean'")
    lengths = response_lengths.to(response_of_target.device)[response_of_target].float()
    return 1.0 / (lengths * max(size.sequences, 1))


def kl_to_reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Return an estimate of KL(policy || reference) from each sampled token, both inputs (n,).

    With d = reference - policy, in the names of Schulman's note "Approximating KL divergence": ``k1`` is -d,
    unbiased but noisy; ``k2`` is d^2 / 2, biased; ``k3`` is exp(d) - d - 1, unbiased and never negative
    (DeepSeekMath eq. 4, TRL).
    """
    difference = ref_logprobs - logprobs
    match estimator:
        case "k1":
            return -difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return torch.exp(difference) - difference - 1.0
    raise LossError(f"KL estimator {estimator!r} is unknown; use 'k1', 'k2' or 'k3'")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    options: PolicyLossOptions,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    engine_logprobs: Tensor | None = None,
    response_of_target: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Return this micro-batch's part of the loss to be minimised, and its statistics.

    Args:
        logprobs: (n,) log-probs of the sampled tokens under the policy, with gradient.
        old_logprobs: (n,) under the policy that sampled; None for an on-policy step (ratio one, gradient
            kept).
        advantages: (n,) of the response each token belongs to.
        weights: (n,) from `token_weights`.
        ref_logprobs: (n,) under the reference model, needed when ``options.kl_coef`` is not zero.
        entropy: (n,) of the policy's distributions, for the statistics only.
        engine_logprobs: (n,) as the engine that sampled reported them, needed with ``options.importance``.
        response_of_target: (n,) which response a token belongs to, needed with it as well.

    Returns:
        (loss (), statistics).
    """
    if options.kl_coef != 0.0 and ref_logprobs is None:
        raise LossError(f"kl_coef is {options.kl_coef} but no reference log-probs were computed")
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old)
    clipped_ratio = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    token_loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    importance, capped = torch.ones_like(old), torch.zeros_like(old)
    if options.importance != "none":
        if engine_logprobs is None or response_of_target is None:
            raise LossError(f"importance is {options.importance} but the engine's log-probs were not given")
        ratios = importance_ratios(old, engine_logprobs, response_of_target, options.importance)
        importance = importance_weights(ratios, options.importance, options.importance_cap)
        capped = (ratios > options.importance_cap).float()
        token_loss = token_loss * importance
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = kl_to_reference(logprobs, ref_logprobs, options.kl_estimator)
    if options.kl_coef != 0.0:
        token_loss = token_loss + options.kl_coef * kl
    # A dot product would be one operation, but its order of summation depends on the library's threads.
    loss = (token_loss * weights).sum()

    with torch.no_grad():
        low = (ratio < 1.0 - options.clip_low) & (advantages < 0)
        high = (ratio > 1.0 + options.clip_high) & (advantages > 0)
        stats = PolicyStats(
            tokens=_total(torch.ones_like(logprobs)),
            loss=loss.detach().double(),
            kl=_total(kl),
            clipped=_total(low | high),
            clipped_low=_total(low),
            clipped_high=_total(high),
            entropy=_total(torch.zeros_like(logprobs) if entropy is None else entropy),
            ratio=_total(ratio),
            importance=_total(importance),
            importance_capped=_total(capped),
            ratio_max=ratio.max().double() if ratio.numel() else torch.zeros((), dtype=torch.float64),
        )
    return loss, stats


def _total(values: Tensor) -> Tensor:
    return values.detach().double().sum()
