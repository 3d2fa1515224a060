import pytest
import torch

from megavila.rl.losses import (
    LossError,
    PolicyLossOptions,
    StepSize,
    kl_to_reference,
    policy_loss,
    token_weights,
)

LENGTHS = torch.tensor([3, 1, 7, 5])


def make_batch(seed: int = 0, spread: float = 0.4):
    generator = torch.Generator().manual_seed(seed)
    n = int(LENGTHS.sum())
    logprobs = -torch.rand(n, generator=generator) * 3
    old = logprobs + spread * torch.randn(n, generator=generator)
    ref = logprobs + spread * torch.randn(n, generator=generator)
    advantages = torch.randn(len(LENGTHS), generator=generator)
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS)
    return logprobs, old, ref, advantages, owner


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_micro_batches_add_up_to_the_whole_step(aggregation):
    logprobs, old, ref, advantages, owner = make_batch()
    size = StepSize(sequences=4, tokens=16)
    options = PolicyLossOptions(0.2, 0.3, 0.1, aggregation=aggregation)
    whole = logprobs.clone().requires_grad_()
    weights = token_weights(owner, LENGTHS, size, aggregation)
    loss, stats = policy_loss(whole, old, advantages[owner], weights, options, ref_logprobs=ref)
    loss.backward()

    parts = logprobs.clone().requires_grad_()
    total, total_stats = torch.zeros(()), None
    for chosen in (owner == 0, owner == 3, (owner == 1) | (owner == 2)):
        w = token_weights(owner[chosen], LENGTHS, size, aggregation)
        part, part_stats = policy_loss(
            parts[chosen], old[chosen], advantages[owner[chosen]], w, options, ref_logprobs=ref[chosen]
        )
        part.backward()
        total = total + part.detach()
        total_stats = part_stats if total_stats is None else total_stats + part_stats
    torch.testing.assert_close(total, loss.detach())
    torch.testing.assert_close(parts.grad, whole.grad)
    assert total_stats is not None
    assert total_stats.tokens == stats.tokens == 16
    assert total_stats.clipped == stats.clipped > 0
    assert total_stats.ratio_max == stats.ratio_max
    torch.testing.assert_close(total_stats.kl, stats.kl)


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs, _, _, advantages, owner = make_batch()
    logprobs.requires_grad_()
    weights = token_weights(owner, LENGTHS, StepSize(4, 16), "sequence_mean")
    loss, stats = policy_loss(logprobs, None, advantages[owner], weights, PolicyLossOptions())
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages[owner] * weights)
    assert stats.ratio_max == 1.0 and stats.clipped == 0


def test_clipped_tokens_have_no_gradient_and_only_on_the_harmful_side():
    logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, stats = policy_loss(
        logprobs, torch.zeros(5), advantages, torch.ones(5), PolicyLossOptions(0.2, 0.3)
    )
    loss.backward()
    assert (logprobs.grad == 0).tolist() == [True, False, False, True, False]
    assert (stats.clipped, stats.clipped_low, stats.clipped_high) == (2, 1, 1)


def test_kl_estimates():
    policy, reference = (torch.randn(9, generator=torch.Generator().manual_seed(s)).double() for s in (3, 4))
    p, q = policy.log_softmax(0), reference.log_softmax(0)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    for unbiased in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_to_reference(p, q, unbiased)).sum(), expected)
    assert (kl_to_reference(p, q) >= 0).all() and (kl_to_reference(p, q, "k1") < 0).any()
    # k2 agrees with the others to second order where the policies are close.
    near = (p + 1e-4 * (q - p)).log_softmax(0)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=near)
    )
    torch.testing.assert_close(
        (p.exp() * kl_to_reference(p, near, "k2")).sum(), divergence, rtol=1e-2, atol=0
    )
    with pytest.raises(LossError, match="k4"):
        kl_to_reference(p, q, "k4")


def test_kl_needs_a_reference():
    logprobs, *_ = make_batch()
    with pytest.raises(LossError, match="no reference"):
        policy_loss(logprobs, None, logprobs, logprobs, PolicyLossOptions(kl_coef=0.1))


def test_unknown_aggregation_is_named():
    with pytest.raises(LossError, match="batch_mean"):
        token_weights(torch.zeros(2, dtype=torch.long), torch.tensor([2]), StepSize(1, 2), "batch_mean")
