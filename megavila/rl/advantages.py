"""Group-relative advantages: equation 2 of "Scaling RL to Long Videos" (arXiv 2507.07966)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megavila.runtime.errors import MegavilaError


class AdvantageError(MegavilaError):
    """Rewards from which no advantages can be computed."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of a batch of groups and what is worth reporting about them."""

    values: Tensor  # (groups, group_size) float32
    informative: Tensor  # (groups,) bool: the group's rewards differ, so its advantages are not all zero


def group_advantages(
    rewards: Tensor, *, scale: str = "group", ddof: int = 1, eps: float = 1e-4
) -> Advantages:
    """Return how much better each response is than its group: ``(r - mean(group)) / (std(group) + eps)``.

    The paper does not say which standard deviation it means. ``ddof=1`` (divide by G - 1) is what TRL and
    verl compute and is the default, as is TRL's ``eps``; ``ddof=0`` is the population form. A group whose
    rewards are all equal gets exactly zero, where the formula alone would amplify rounding.

    Args:
        rewards: (groups, group_size), finite.
        scale: ``"group"`` as above; ``"none"`` only subtracts the group's mean.

    Raises:
        AdvantageError: a group of one (nothing to compare with), a non-finite reward or an unknown ``scale``.
    """
    if rewards.ndim != 2:
        raise AdvantageError(f"rewards must be (groups, group_size), got a shape of {tuple(rewards.shape)}")
    if rewards.shape[1] < 2:
        raise AdvantageError(
            f"a group of {rewards.shape[1]} has nothing to be compared with; use rollout.group_size >= 2"
        )
    if scale not in ("group", "none"):
        raise AdvantageError(f"advantage scale {scale!r} is unknown; use 'group' or 'none'")
    if not torch.isfinite(rewards).all():
        group, response = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise AdvantageError(
            f"the reward of response {response} in group {group} is {rewards[group, response].item()}; "
            "reward functions must return finite numbers"
        )
    rewards = rewards.float()
    informative = rewards.amax(dim=1) > rewards.amin(dim=1)
    values = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        values = values / (rewards.std(dim=1, keepdim=True, correction=ddof) + eps)
    return Advantages(values * informative[:, None], informative)
