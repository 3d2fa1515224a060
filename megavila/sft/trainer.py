"""Supervised fine-tuning on chains of thought: section 4.1 of arXiv 2507.07966.

A row is a group of one response, the target text, so SFT takes the same path as GRPO: the same prompts, the
same encoder, layout and log-probs. The loss is the cross-entropy of the target tokens, averaged over all of
the step's.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from megavila.config import SftRunConfig
from megavila.data.targets import ReasoningHook, target_text
from megavila.mrsp.layout import Group, build_layout
from megavila.mrsp.logprobs import response_logprobs
from megavila.mrsp.shards import ShardedRows
from megavila.runtime.collectives import broadcast_object
from megavila.runtime.seeds import derive_seed
from megavila.training.agreement import together
from megavila.training.batching import Piece, micro_batches
from megavila.training.examples import Example, draw_examples
from megavila.training.session import Session
from megavila.training.tally import Tally, sum_over_data
from megavila.training.update import apply_update, skip_update


class SftTrainer:
    """One batch of rows and one update a step.

    Args:
        rewrite: supplies the reasoning that fits the frames shown; a row for which it returns None is left
            out and counted. Without it the row's own reasoning is the target.
    """

    label = "SFT"
    headline: tuple[str, ...] = ("sft/loss", "optimizer/grad_norm")
    reference = ""

    def __init__(self, session: Session, rewrite: ReasoningHook | None = None) -> None:
        assert isinstance(session.config, SftRunConfig)
        self.session = session
        self.config = session.config
        self.rewrite = rewrite

    def train_step(self, step: int) -> Mapping[str, float]:
        """Draw a batch, take one step of the optimizer and return the step's metrics."""
        session, tally = self.session, Tally()
        examples = draw_examples(
            session, self.config.sft.batch_size, tally, encode=not session.encoder.encode_again
        )
        # One rank speaks for its replica: reasoning that a hook samples would differ from rank to rank.
        speaks = session.topology.mrsp_rank == 0
        targets = together(lambda: self._targets(step, examples) if speaks else None, session.topology)
        targets = broadcast_object(targets, session.topology.mrsp_group)
        taught = [(e, t) for e, t in zip(examples, targets, strict=True) if t is not None]
        groups = [Group(example.prompt, (target,)) for example, target in taught]
        media_rows = [example.media_rows for example, _ in taught]
        tokens = sum_over_data({"tokens": sum(len(t) for _, t in taught)}, session.topology)["tokens"]
        tally.total("sft/left_out", len(examples) - len(taught))
        tally.total("tokens/prompt", sum(group.prompt_tokens for group in groups))
        tally.total("tokens/response", sum(group.response_tokens for group in groups))
        tally.mean("sft/loss", 0.0, 0)
        with session.timers("time/update"):
            budget, kind = self.config.sft.max_tokens_per_microbatch, self.config.mrsp.layout
            for batch in together(lambda: micro_batches(groups, budget, kind), session.topology):
                self._accumulate(batch, media_rows, tokens, tally)
            if tokens:
                apply_update(session, tally)
            else:
                skip_update(session, tally)
        session.encoder.report(session.prompts.builder.tokens_per_frame, session.work, tally)
        return tally.reduce(session.topology)

    def _targets(self, step: int, examples: Sequence[Example]) -> list[Tensor | None]:
        """Token ids of what each example's response should be."""
        targets: list[Tensor | None] = []
        for example in examples:
            row, videos = example.prompt.row, example.prompt.videos
            seed = derive_seed(self.config.run.seed, "think", step, row.problem_id)
            text = target_text(
                row,
                videos[0].timestamps if videos else (),
                rewrite=self.rewrite,
                think=seed < self.config.sft.think_fraction * 2.0**63,
            )
            targets.append(None if text is None else self.session.prompts.builder.encode_response(text))
        return targets

    def _accumulate(
        self, batch: Sequence[Piece], media_rows: Sequence[ShardedRows | None], tokens: int, tally: Tally
    ) -> None:
        """Add the gradient of one micro-batch."""
        session = self.session
        layout = build_layout([piece.group for piece in batch], self.config.mrsp.layout)
        tally.total("tokens/llm_forward", layout.num_tokens)
        session.work.count_layout(layout, tally, grad=True)
        rows = session.encoder.rows_for_training(
            [piece.group.prompt for piece in batch], [media_rows[piece.owner] for piece in batch], grad=True
        )
        logprobs = response_logprobs(session.model, layout.to(session.platform.device), rows)
        (-logprobs.sum() / tokens).backward()
        tally.mean("sft/loss", -float(logprobs.detach().double().sum()), len(logprobs))
