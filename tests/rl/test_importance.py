"""Importance correction against the formulas, written out response by response."""

import math

import pytest
import torch

from megavila.rl.importance import importance_ratios
from megavila.rl.losses import LossError, PolicyLossOptions, StepSize, policy_loss, token_weights
from megavila.runtime.errors import MegavilaError

LENGTHS = torch.tensor([3, 1, 7, 5])
OWNER = torch.repeat_interleave(torch.arange(4), LENGTHS)
CAP = 1.3
KINDS = ["token_truncated", "token_masked", "sequence", "geometric_mean"]


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    n = int(LENGTHS.sum())
    new = (-3 * torch.rand(n, generator=generator, dtype=torch.float64)).requires_grad_()
    old = new.detach() + 0.2 * torch.randn(n, generator=generator, dtype=torch.float64)
    engine = old + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    ref = old + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return new, old, engine, ref, torch.randn(4, generator=generator, dtype=torch.float64)


def plain_weights(old: torch.Tensor, engine: torch.Tensor, kind: str) -> list[float]:
    weights = []
    for response in range(4):
        ratios = [math.exp(o - e) for o, e, r in zip(old, engine, OWNER, strict=True) if r == response]
        if kind == "token_truncated":
            weights += [min(ratio, CAP) for ratio in ratios]
        elif kind == "token_masked":
            weights += [ratio if ratio <= CAP else 0.0 for ratio in ratios]
        elif kind == "sequence":
            weights += [min(math.prod(ratios), CAP)] * len(ratios)
        else:
            weights += [min(math.prod(ratios) ** (1 / len(ratios)), CAP)] * len(ratios)
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_loss_and_gradient_equal_the_formula(kind: str, on_policy: bool) -> None:
    new, old, engine, ref, advantages = batch()
    options = PolicyLossOptions(0.2, 0.2, 0.1, importance=kind, importance_cap=CAP)
    weights = token_weights(OWNER, LENGTHS, StepSize(4, 16), "sequence_mean").double()
    loss, stats = policy_loss(
        new,
        None if on_policy else old,
        advantages[OWNER],
        weights,
        options,
        ref_logprobs=ref,
        engine_logprobs=engine,
        response_of_target=OWNER,
    )
    (gradient,) = torch.autograd.grad(loss, new)

    base = new.detach() if on_policy else old
    expected = torch.zeros((), dtype=torch.float64)
    correction = plain_weights(base, engine, kind)
    for i, weight in enumerate(correction):
        ratio, advantage = (new[i] - base[i]).exp(), advantages[OWNER[i]]
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        kl = (
            (ref[i] - new[i]).exp() - (ref[i] - new[i]) - 1
        )  # not an expectation over the engine's samples alone
        expected = expected + (0.1 * kl - weight * gain) / (LENGTHS[OWNER[i]] * 4)
    (expected_gradient,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert float(stats.importance) == pytest.approx(sum(correction))
    ratios = importance_ratios(base, engine, OWNER, kind)
    assert 0 < float(stats.importance_capped) == int((ratios > CAP).sum()) < 16


def test_equal_policies_leave_the_loss_alone() -> None:
    new, old, _, _, advantages = batch(1)
    weights = token_weights(OWNER, LENGTHS, StepSize(4, 16), "sequence_mean").double()
    plain, _ = policy_loss(new, old, advantages[OWNER], weights, PolicyLossOptions())
    for kind in KINDS:
        options = PolicyLossOptions(importance=kind)
        corrected, stats = policy_loss(
            new,
            old,
            advantages[OWNER],
            weights,
            options,
            engine_logprobs=old,
            response_of_target=OWNER,
        )
        torch.testing.assert_close(corrected, plain)
        assert (float(stats.importance), float(stats.importance_capped)) == (16, 0)


def test_bad_settings_are_explained() -> None:
    new, old, engine, _, advantages = batch()
    weights = torch.ones(16)
    with pytest.raises(LossError, match="importance is sequence but the engine's log-probs were not given"):
        policy_loss(new, old, advantages[OWNER], weights, PolicyLossOptions(importance="sequence"))
    with pytest.raises(MegavilaError, match="importance 'tis' is unknown; use none, token_truncated"):
        importance_ratios(old, engine, OWNER, "tis")
