"""What a GRPO step tells about itself, under the names of the metrics file."""

from collections.abc import Sequence

from torch import Tensor

from megavila.rl.groups import ScoredGroup
from megavila.rl.losses import PolicyStats
from megavila.rollout.protocol import RolloutCounts, RolloutError
from megavila.runtime.collectives import gather_objects
from megavila.runtime.topology import Topology
from megavila.training.tally import Tally

_MEANS = (
    "grpo/kl",
    "grpo/clip_fraction",
    "grpo/clip_fraction_low",
    "grpo/clip_fraction_high",
    "grpo/entropy",
    "grpo/ratio_mean",
    "grpo/importance_mean",
    "grpo/importance_capped",
    "rollout/logprob_abs_diff_mean",
)
_MAXIMA = ("grpo/ratio_max", "rollout/logprob_abs_diff_max", "optimizer/lr", "optimizer/grad_norm")
_TOTALS = ("grpo/loss", "grpo/zero_std_groups", "optimizer/skipped_updates")


def prepare(tally: Tally) -> None:
    """Enter every name, so that each step's line has the same ones, also where nothing was learned."""
    for name in _MEANS:
        tally.mean(name, 0.0, 0)
    for name in _MAXIMA:
        tally.maximum(name, 0.0)
    for name in _TOTALS:
        tally.total(name, 0)


def describe_groups(groups: Sequence[ScoredGroup], tally: Tally) -> None:
    """Rewards, advantages and lengths of a rollout batch, before any group is left out."""
    for group in groups:
        size = len(group.responses)
        tally.mean("reward/mean", sum(score.total for score in group.scores), size)
        tally.mean("reward/format", sum(score.format for score in group.scores), size)
        tally.mean("reward/accuracy", sum(score.accuracy for score in group.scores), size)
        # Advantages of a group have mean zero, so this is the square of their standard deviation.
        tally.mean("grpo/advantage_variance", float(group.advantages.double().square().sum()), size)
        tally.total("grpo/zero_std_groups", 0 if group.informative else 1)
        tally.total("tokens/prompt", len(group.prompt.token_ids))
        tally.total("tokens/response", group.num_tokens)
        tally.mean("response/tokens", group.num_tokens, size)
        tally.mean(
            "response/cut_off", sum(response.finish_reason == "length" for response in group.responses), size
        )


def describe_update(stats: PolicyStats, tally: Tally) -> None:
    """Sums over the tokens of one micro-batch."""
    tokens = float(stats.tokens)
    tally.total("grpo/loss", float(stats.loss))
    tally.mean("grpo/kl", float(stats.kl), tokens)
    tally.mean("grpo/clip_fraction", float(stats.clipped), tokens)
    tally.mean("grpo/clip_fraction_low", float(stats.clipped_low), tokens)
    tally.mean("grpo/clip_fraction_high", float(stats.clipped_high), tokens)
    tally.mean("grpo/entropy", float(stats.entropy), tokens)
    tally.mean("grpo/ratio_mean", float(stats.ratio), tokens)
    tally.mean("grpo/importance_mean", float(stats.importance), tokens)
    tally.mean("grpo/importance_capped", float(stats.importance_capped), tokens)
    tally.maximum("grpo/ratio_max", float(stats.ratio_max))


def compare_with_engine(engine: Tensor, trainer: Tensor, tally: Tally) -> None:
    """How far the log-probs (n,) of the engine that sampled are from the trainer's own, same weights."""
    difference = (engine.to(trainer.device) - trainer).abs().double()
    if difference.numel():
        tally.mean("rollout/logprob_abs_diff_mean", float(difference.sum()), difference.numel())
        tally.maximum("rollout/logprob_abs_diff_max", float(difference.max()))


def describe_engine(counts: RolloutCounts, topology: Topology, tally: Tally) -> None:
    """What the engine computed, and what it did not have to, over the ranks that shared the prompts out."""
    for share in gather_objects(counts, topology.context_group):
        tally.total("rollout/prefill_tokens", share.prefill_tokens)
        tally.total("rollout/prefix_tokens_reused", share.reused_prompt_tokens)
        tally.total("rollout/engine_failures", share.failures)


def check_agreement(difference: float, limit: float | None, engine: str, step: int) -> None:
    """Raises RolloutError where the step's largest difference between engine and trainer is above the limit."""
    if limit is not None and not difference <= limit:  # also where it is not a number
        raise RolloutError(
            f"step {step}: the log-prob of a sampled token differs by {difference:.3g} between engine {engine} and "
            f"trainer, rollout.max_logprob_diff is {limit}; the step was not saved. The two no longer compute the "
            "same: compare their types and positions, correct with rollout.importance, or raise the limit"
        )


def finish(metrics: dict[str, float], updates: int) -> dict[str, float]:
    """Turn sums over a step's updates into what is reported: the mean loss, the advantages' deviation."""
    metrics["grpo/loss"] /= max(updates, 1)
    metrics["grpo/advantage_std"] = metrics.pop("grpo/advantage_variance", 0.0) ** 0.5
    return metrics
