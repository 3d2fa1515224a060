"""Group relative policy optimisation on long videos: section 4.2 of arXiv 2507.07966.

For each question q the policy samples a group of G responses o_1 … o_G; rule-based rewards r_i (format,
accuracy) are normalised within the group to advantages A_i (equation 2); the policy then maximises, over G
and over questions,

    min(ratio_i · A_i, clip(ratio_i, 1 - eps, 1 + eps) · A_i) - beta · KL(policy || reference)

(equation 1).

Each video is encoded once for all of this, and each prompt stands once before its G responses.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megavila.config import GrpoRunConfig
from megavila.data import Row
from megavila.mrsp.layout import Layout, build_layout
from megavila.mrsp.logprobs import response_logprobs, response_logprobs_and_entropy
from megavila.mrsp.shards import ShardedRows
from megavila.rewards import Score, Scorer
from megavila.rl.advantages import group_advantages
from megavila.rl.dump import dump_rollouts
from megavila.rl.groups import ScoredGroup, split_updates
from megavila.rl.losses import PolicyLossOptions, StepSize, policy_loss, token_weights
from megavila.rl.reference import ReferenceWeights
from megavila.rl.report import (
    check_agreement,
    compare_with_engine,
    describe_engine,
    describe_groups,
    describe_update,
    finish,
    prepare,
)
from megavila.rollout.protocol import RolloutEngine, SamplingParams
from megavila.runtime.collectives import gather_objects
from megavila.runtime.seeds import derive_seed
from megavila.training.agreement import together
from megavila.training.batching import Piece, micro_batches
from megavila.training.examples import Example, draw_examples
from megavila.training.session import Session
from megavila.training.tally import Tally, sum_over_data
from megavila.training.update import apply_update, skip_update

LogProbs = dict[tuple[int, int], Tensor]
"""(index of a group, number of its response) -> log-probs of its tokens, (R,)."""


class GrpoTrainer:
    """One rollout batch, and the updates from it, a step."""

    label = "GRPO"
    headline: tuple[str, ...] = ("reward/mean", "reward/accuracy", "grpo/loss")

    def __init__(self, session: Session, engine: RolloutEngine, scorer: Scorer) -> None:
        config = session.config
        assert isinstance(config, GrpoRunConfig)
        self.session = session
        self.config = config
        self.engine = engine
        self.scorer = scorer
        self.options = PolicyLossOptions(
            clip_low=config.grpo.clip_low,
            clip_high=config.grpo.clip_high,
            kl_coef=config.grpo.kl_beta,
            kl_estimator=config.grpo.kl_estimator,
            aggregation=config.grpo.loss_aggregation,
            importance=config.rollout.importance,
            importance_cap=config.rollout.importance_cap,
        )
        self.sampling = SamplingParams(
            max_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop=config.rollout.stop,
            group_size=config.rollout.group_size,
        )
        self.reference_model = ReferenceWeights(session.model) if config.grpo.kl_beta > 0 else None
        self.reference = self.reference_model.fingerprint(session.topology) if self.reference_model else ""

    def train_step(self, step: int) -> Mapping[str, float]:
        """Sample a batch, score it and learn from it; return the step's metrics."""
        config, tally = self.config.grpo, Tally()
        prepare(tally)
        examples = draw_examples(self.session, config.prompts_per_step, tally)
        groups = self.rollout(step, examples, tally)
        dump_rollouts(self.session, step, groups)
        describe_groups(groups, tally)
        if config.drop_zero_variance:
            groups = [group for group in groups if group.informative]
        parts = split_updates(groups, config.prompts_per_step, config.updates_per_batch)
        # The first update still has the policy that sampled: its own pass gives its groups' old log-probs.
        old = self.old_logprobs([group for part in parts[1:] for group in part], tally)
        reference = self.reference_logprobs(groups, tally)
        for _ in range(config.epochs_per_batch):
            for part in parts:
                self.update(part, old, reference, tally)
        describe_engine(self.engine.take_counts(), self.session.topology, tally)
        self.session.encoder.report(self.session.prompts.builder.tokens_per_frame, self.session.work, tally)
        updates = config.updates_per_batch * config.epochs_per_batch
        metrics = finish(tally.reduce(self.session.topology), updates)
        rollout = self.config.rollout
        check_agreement(
            metrics["rollout/logprob_abs_diff_max"], rollout.max_logprob_diff, rollout.engine, step
        )
        return metrics

    def rollout(self, step: int, examples: Sequence[Example], tally: Tally) -> list[ScoredGroup]:
        """Sample G responses to each prompt, score them and compute their advantages."""
        seed = self.config.run.seed
        # Here, not after the update that made them: a run that goes on from a checkpoint has new weights, too.
        with self.session.timers("time/weight_transfer"):
            self.engine.update_weights()
        with self.session.timers("time/rollout"):
            sampled = self.engine.generate(
                [example.prompt for example in examples],
                [None if e.media_rows is None else e.media_rows.whole() for e in examples],
                self.sampling,
                [derive_seed(seed, "rollout", step, e.prompt.row.problem_id) for e in examples],
            )
            self.engine.sleep()
        with self.session.timers("time/reward"):
            rows = [
                example.prompt.row for example, group in zip(examples, sampled, strict=True) for _ in group
            ]
            texts = [response.text for group in sampled for response in group]
            scores = self._score(rows, texts)
        # With a shared prefill the engine reads each prompt once and then each sampled token.
        for example, group in zip(examples, sampled, strict=True):
            prompt_tokens, lengths = len(example.prompt.token_ids), [len(r.token_ids) for r in group]
            tally.total("tokens/llm_forward", prompt_tokens + sum(lengths))
            self.session.work.count_rollout(prompt_tokens, lengths, tally)
        groups = []
        size = self.sampling.group_size
        for place, (example, responses) in enumerate(zip(examples, sampled, strict=True)):
            own = tuple(scores[place * size : (place + 1) * size])
            rewards = torch.tensor([[score.total for score in own]], dtype=torch.float32)
            advantages = group_advantages(
                rewards, scale="group" if self.config.grpo.advantage_std else "none"
            )
            groups.append(
                ScoredGroup(
                    index=example.index,
                    prompt=example.prompt,
                    media_rows=example.media_rows,
                    responses=responses,
                    scores=own,
                    advantages=advantages.values[0],
                    informative=bool(advantages.informative[0]),
                )
            )
        return groups

    def _score(self, rows: list[Row], texts: list[str]) -> list[Score]:
        """Scores of all responses of this replica, each given once: a judge may cost money, or change its mind."""
        topology = self.session.topology
        own = slice(topology.mrsp_rank, None, topology.mrsp_size)
        mine = together(lambda: self.scorer.score(rows[own], texts[own]), topology)
        shares = gather_objects(mine, topology.mrsp_group)
        return [shares[place % len(shares)][place // len(shares)] for place in range(len(texts))]

    def old_logprobs(self, groups: Sequence[ScoredGroup], tally: Tally) -> LogProbs:
        """Log-probs under the policy that sampled, as the trainer computes them, before it changes."""
        with self.session.timers("time/old_logprob"):
            old = self._logprobs(groups, tally)
        for group in groups:
            for number, response in enumerate(group.responses):
                compare_with_engine(response.logprobs, old[group.index, number], tally)
        return old

    def reference_logprobs(self, groups: Sequence[ScoredGroup], tally: Tally) -> LogProbs | None:
        """Log-probs under the reference model, None where it has no say."""
        if self.reference_model is None:
            return None
        with self.session.timers("time/ref_logprob"), self.reference_model.in_place():
            return self._logprobs(groups, tally)

    @torch.no_grad()
    def _logprobs(self, groups: Sequence[ScoredGroup], tally: Tally) -> LogProbs:
        found: LogProbs = {}
        for batch in self._micro_batches(groups):
            layout, media_rows = self._lay_out(groups, batch, tally)
            logprobs = response_logprobs(
                self.session.model, layout, media_rows, temperature=self.sampling.temperature
            )
            found |= zip(
                _responses(groups, batch), logprobs.split(layout.response_lengths.tolist()), strict=True
            )
        return found

    def update(
        self,
        groups: Sequence[ScoredGroup],
        old: LogProbs,
        reference: LogProbs | None,
        tally: Tally,
    ) -> None:
        """One step of the optimizer along the gradient of equation 1 over ``groups`` of all ranks."""
        counts = {
            "sequences": sum(len(group.responses) for group in groups),
            "tokens": sum(group.num_tokens for group in groups),
        }
        size = StepSize(**sum_over_data(counts, self.session.topology))
        if size.sequences == 0:  # no group of the batch differs in its rewards: there is no gradient
            skip_update(self.session, tally)
            return
        with self.session.timers("time/update"):
            for batch in self._micro_batches(groups):
                self._accumulate(groups, batch, size, old, reference, tally)
            apply_update(self.session, tally)

    def _accumulate(
        self,
        groups: Sequence[ScoredGroup],
        batch: Sequence[Piece],
        size: StepSize,
        old: LogProbs,
        reference: LogProbs | None,
        tally: Tally,
    ) -> None:
        """Add the gradient of one micro-batch."""
        layout, media_rows = self._lay_out(groups, batch, tally, grad=True)
        logprobs, entropy = response_logprobs_and_entropy(
            self.session.model, layout, media_rows, temperature=self.sampling.temperature
        )
        responses, lengths = _responses(groups, batch), layout.response_lengths
        owners = [groups[piece.owner] for piece in batch]
        cuts = [slice(piece.first, piece.stop) for piece in batch]
        advantages = torch.cat([group.advantages[cut] for group, cut in zip(owners, cuts, strict=True)])
        sampled = [r.logprobs for group, cut in zip(owners, cuts, strict=True) for r in group.responses[cut]]
        on_policy = responses[0] not in old  # so for the whole micro-batch
        loss, stats = policy_loss(
            logprobs,
            None if on_policy else torch.cat([old[response] for response in responses]),
            advantages.to(logprobs.device)[layout.response_of_target],
            token_weights(layout.response_of_target, lengths, size, self.options.aggregation),
            self.options,
            ref_logprobs=None if reference is None else torch.cat([reference[r] for r in responses]),
            entropy=entropy,
            engine_logprobs=torch.cat(sampled).to(logprobs.device),
            response_of_target=layout.response_of_target,
        )
        loss.backward()
        describe_update(stats, tally)
        if on_policy:
            old |= zip(responses, logprobs.detach().split(lengths.tolist()), strict=True)
            for response, engine in zip(responses, sampled, strict=True):
                compare_with_engine(engine, old[response], tally)

    def _micro_batches(self, groups: Sequence[ScoredGroup]) -> list[list[Piece]]:
        budget, kind = self.config.grpo.max_tokens_per_microbatch, self.config.mrsp.layout
        return micro_batches([group.group for group in groups], budget, kind)

    def _lay_out(
        self, groups: Sequence[ScoredGroup], batch: Sequence[Piece], tally: Tally, *, grad: bool = False
    ) -> tuple[Layout, list[ShardedRows | None]]:
        layout = build_layout([piece.group for piece in batch], self.config.mrsp.layout)
        tally.total("tokens/llm_forward", layout.num_tokens)
        self.session.work.count_layout(layout, tally, grad=grad)
        owners = [groups[piece.owner] for piece in batch]
        media_rows = self.session.encoder.rows_for_training(
            [group.prompt for group in owners], [group.media_rows for group in owners], grad=grad
        )
        return layout.to(self.session.platform.device), media_rows


def _responses(groups: Sequence[ScoredGroup], batch: Sequence[Piece]) -> list[tuple[int, int]]:
    """Names of the responses of a micro-batch, in the order of its layout."""
    return [
        (groups[piece.owner].index, number) for piece in batch for number in range(piece.first, piece.stop)
    ]
