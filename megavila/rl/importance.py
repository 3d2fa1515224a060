"""Correction for sampling with one program and learning with another.

Engine and trainer hold the same weights, but their kernels round differently, so responses come from a slightly
other policy than the one that is improved. With w = pi_trainer / pi_engine, before the policy changes, the
policy gradient is unbiased when each token's part is multiplied by the weight of its sequence; cutting the weight
at a cap trades variance for a little bias ("Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training", Yao et al. 2025, where the token form is called truncated importance sampling).
"""

import torch
from torch import Tensor

from megavila.runtime.errors import MegavilaError


def importance_ratios(trainer: Tensor, engine: Tensor, response_of_target: Tensor, kind: str) -> Tensor:
    """Return the ratio that ``kind`` gives each token, (n,), before it is cut.

    With d = trainer - engine: ``token_truncated`` and ``token_masked`` take exp(d) of the token, ``sequence``
    exp(sum of d over its response), ``geometric_mean`` exp(mean of d over its response).

    Args:
        trainer, engine: (n,) log-probs of the sampled tokens under the weights that sampled.
        response_of_target: (n,) which response a token belongs to, all tokens of a response at hand.
    """
    difference = trainer - engine
    if kind in ("token_truncated", "token_masked"):
        return difference.exp()
    if kind not in ("sequence", "geometric_mean"):
        raise MegavilaError(
            f"importance {kind!r} is unknown; use none, token_truncated, token_masked, sequence or geometric_mean"
        )
    lengths = torch.bincount(response_of_target)
    sums = difference.new_zeros(len(lengths)).index_add(0, response_of_target, difference)
    if kind == "geometric_mean":
        sums = sums / lengths.clamp(min=1)
    return sums.exp()[response_of_target]


def importance_weights(ratios: Tensor, kind: str, cap: float) -> Tensor:
    """Return what each token's part of the policy loss is multiplied by, (n,): ratios cut at ``cap``.

    ``token_masked`` leaves tokens above the cap out, the others take the cap.
    """
    if kind == "token_masked":
        return ratios.where(ratios <= cap, 0.0)
    return ratios.clamp(max=cap)
