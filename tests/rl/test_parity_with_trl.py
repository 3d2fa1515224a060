"""The loss, KL, clip statistics, advantages and gradients of TRL's GRPOTrainer on the same tensors."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from megavila.rl.advantages import group_advantages
from megavila.rl.losses import PolicyLossOptions, StepSize, policy_loss, token_weights

trl_grpo = pytest.importorskip("trl.trainer.grpo_trainer")


class OneProcess:
    """The parts of `accelerate.Accelerator` the loss uses."""

    num_processes = 1

    def reduce(self, tensor, reduction="sum"):
        return tensor

    def gather(self, tensor):
        return tensor.reshape(-1)


def trl_trainer(beta, loss_type, clip_low, clip_high):
    trainer = SimpleNamespace(
        beta=beta,
        loss_type=loss_type,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=64,
        model=SimpleNamespace(training=True),
        accelerator=OneProcess(),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _metrics={"train": defaultdict(list)},
    )
    return trainer


def random_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 1, 9, 4, 7, 2, 9, 3])
    shape = (len(lengths), int(lengths.max()))
    mask = torch.arange(shape[1])[None] < lengths[:, None]
    logprobs = -3 * torch.rand(shape, generator=generator)
    old = logprobs + 0.4 * torch.randn(shape, generator=generator)
    ref = logprobs + 0.4 * torch.randn(shape, generator=generator)
    entropy = torch.rand(shape, generator=generator)
    rewards = torch.rand(2, 4, generator=generator)
    return lengths, mask, logprobs, old, ref, entropy, rewards


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("trl_loss", "ours"), [("grpo", "sequence_mean"), ("dapo", "token_mean")])
@pytest.mark.parametrize("beta", [0.0, 0.07])
def test_loss_kl_clip_and_gradients_equal_trl(seed, trl_loss, ours, beta):
    lengths, mask, logprobs, old, ref, entropy, rewards = random_batch(seed)
    advantages = group_advantages(rewards).values.reshape(-1)
    theirs = logprobs.clone().requires_grad_()
    trainer = trl_trainer(beta, trl_loss, 0.2, 0.28)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (theirs, entropy, None)
    inputs = {
        "prompt_ids": torch.zeros(len(lengths), 1),
        "prompt_mask": torch.ones(len(lengths), 1),
        "completion_ids": torch.zeros_like(logprobs),
        "completion_mask": mask.float(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    expected = trl_grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()

    packed = logprobs[mask].clone().requires_grad_()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    weights = token_weights(owner, lengths, StepSize(len(lengths), int(lengths.sum())), ours)
    options = PolicyLossOptions(0.2, 0.28, beta, aggregation=ours)
    loss, stats = policy_loss(
        packed, old[mask], advantages[owner], weights, options, ref_logprobs=ref[mask], entropy=entropy[mask]
    )
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(packed.grad, theirs.grad[mask], rtol=1e-5, atol=1e-8)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    tokens = stats.tokens.item()
    assert stats.clipped.item() > 0
    assert stats.clipped.item() / tokens == pytest.approx(metrics["clip_ratio/region_mean"], rel=1e-5)
    assert stats.clipped_low.item() / tokens == pytest.approx(metrics["clip_ratio/low_mean"], rel=1e-5)
    assert stats.clipped_high.item() / tokens == pytest.approx(metrics["clip_ratio/high_mean"], rel=1e-5)
    assert stats.entropy.item() / tokens == pytest.approx(metrics["entropy"], rel=1e-5)
    if beta:
        assert stats.kl.item() / tokens == pytest.approx(metrics["kl"], rel=1e-5)


def test_on_policy_loss_equals_trl():
    lengths, mask, logprobs, _, _, entropy, rewards = random_batch(5)
    advantages = group_advantages(rewards).values.reshape(-1)
    theirs = logprobs.clone().requires_grad_()
    trainer = trl_trainer(0.0, "grpo", 0.2, 0.2)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (theirs, entropy, None)
    blank = torch.zeros(len(lengths), 1)
    inputs = {
        "prompt_ids": blank,
        "prompt_mask": blank + 1,
        "completion_ids": torch.zeros_like(logprobs),
        "completion_mask": mask.float(),
        "advantages": advantages,
    }
    trl_grpo.GRPOTrainer._compute_loss(trainer, None, inputs).backward()
    packed = logprobs[mask].clone().requires_grad_()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    weights = token_weights(owner, lengths, StepSize(len(lengths), int(lengths.sum())), "sequence_mean")
    policy_loss(packed, None, advantages[owner], weights, PolicyLossOptions())[0].backward()
    torch.testing.assert_close(packed.grad, theirs.grad[mask], rtol=1e-5, atol=1e-8)


def test_advantages_equal_trl():
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(9))
    rewards[1] = 0.1  # a group without variance
    completions = [[7, 8]] * rewards.numel()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda tensor: tensor, process_index=0
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        environment_factories=None,
        environments=None,
        tools=None,
        _generate=lambda prompts: (
            [[1]] * len(prompts),
            completions,
            None,
            completions,
            None,
            {},
            None,
            None,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        args=SimpleNamespace(
            per_device_train_batch_size=1,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        _calculate_rewards=lambda *args: rewards.reshape(-1, 1),
        num_generations=rewards.shape[1],
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["reward"],
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": [], "extra": {}},
        _pending_extra_logs={},
        _pending_metrics={},
        log_multimodal=False,
    )
    output = trl_grpo.GRPOTrainer._generate_and_score_completions(
        trainer, [{"prompt": "q"}] * rewards.numel()
    )
    got = group_advantages(rewards)
    expected = output["advantages"].view_as(rewards)
    torch.testing.assert_close(got.values[got.informative], expected[got.informative], rtol=1e-5, atol=1e-7)
    # Where TRL leaves the rounding of the mean, amplified, in a group without variance, we have zero.
    assert expected[1].abs().max() < 1e-3 and (got.values[1] == 0).all()
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [pytest.approx(1 / 3)]
