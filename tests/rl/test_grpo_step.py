"""One step of the GRPO trainer against the paper's equations, written out on transformers."""

import pytest
import torch

import megavila.rl.grpo as grpo_module
from megavila.rewards import Scorer
from megavila.rl.grpo import GrpoTrainer
from megavila.rollout.megatron import MegatronEngine
from megavila.training.session import open_session
from tests.end_to_end.parity import assert_gradients_equal, hf_language_model, hf_logits
from tests.end_to_end.tiny import grpo_config, reward_words, write_world

BETA, LOW, HIGH, TEMPERATURE = 0.3, 0.05, 0.1, 0.8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("grpo")
    write_world(directory, rows=4)
    return directory


class CapturingEngine(MegatronEngine):
    """Keeps what it generated."""

    def generate(self, prompts, media_rows, params, seeds):
        self.generated = super().generate(prompts, media_rows, params, seeds)
        self.prompts, self.media_rows = prompts, media_rows
        return self.generated


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.language.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def logprobs(hf, engine):
    """Log-probs of each response of each group, one unpacked sequence at a time."""
    found = []
    for prompt, rows, group in zip(engine.prompts, engine.media_rows, engine.generated, strict=True):
        for response in group:
            logits = hf_logits(hf, prompt, rows, response.token_ids) / TEMPERATURE
            found.append(logits.log_softmax(-1).gather(1, response.token_ids[:, None]).squeeze(1))
    return found


@pytest.mark.parametrize(("budget", "aggregation"), [(60, "sequence_mean"), (4000, "token_mean")])
@pytest.mark.parametrize("layout", ["shared_prefix", "repeated"])
def test_update_equals_equation_one(world, tmp_path, monkeypatch, budget, aggregation, layout):
    config = grpo_config(
        world,
        f"step{budget}{layout}",
        grpo={
            "kl_beta": BETA,
            "clip_low": LOW,
            "clip_high": HIGH,
            "updates_per_batch": 1,
            "epochs_per_batch": 2,
            "loss_aggregation": aggregation,
            "max_tokens_per_microbatch": budget,
            "drop_zero_variance": False,
        },
        rollout={"temperature": TEMPERATURE},
        mrsp={"layout": layout},
        model={"train_projector": False},
    )
    with open_session(config, max_prompt_tokens=50) as session:
        engine = CapturingEngine(session.model, session.tokenizer, session.topology)
        reference = hf_language_model(session, tmp_path / "reference")
        trainer = GrpoTrainer(session, engine, Scorer(config.reward))
        perturb(session.model, 1)  # away from the reference
        old = hf_language_model(session, tmp_path / "old")
        captured = []

        def apply_update(session, tally):
            captured.append(session.gradients.flat.clone())
            session.gradients.zero()
            if len(captured) == 1:
                perturb(session.model, 2)  # the "step" of the first update: now ratios differ from one
                captured.append(hf_language_model(session, tmp_path / "new"))

        monkeypatch.setattr(grpo_module, "apply_update", apply_update)
        metrics = trainer.train_step(1)
        new = captured[1]
        session.gradients.flat.copy_(captured[2])

        rewards = torch.tensor(
            [
                [reward_words(p.row, r.text) for r in g]
                for p, g in zip(engine.prompts, engine.generated, strict=True)
            ]
        )
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        with torch.no_grad():
            old_logprobs, ref_logprobs = logprobs(old, engine), logprobs(reference, engine)
        terms, kls, clipped, tokens = [], [], 0, 0
        for o, r, n, a in zip(
            old_logprobs, ref_logprobs, logprobs(new, engine), advantages.reshape(-1), strict=True
        ):
            ratio = torch.exp(n - o)
            gain = torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
            kl = torch.exp(r - n) - (r - n) - 1
            terms.append(gain - BETA * kl)
            kls.append(kl.detach())
            clipped += int(((ratio < 1 - LOW) & (a < 0)).sum() + ((ratio > 1 + HIGH) & (a > 0)).sum())
            tokens += len(n)
        if aggregation == "sequence_mean":
            loss = -torch.stack([term.mean() for term in terms]).mean()
        else:
            loss = -torch.cat(terms).mean()
        loss.backward()
        assert clipped > 0
        assert_gradients_equal(session, new, tolerance=1e-4)

        # Of the metrics, the ones of the rollout; those of the updates are means over both of them.
        assert metrics["reward/mean"] == pytest.approx(rewards.mean().item(), rel=1e-5)
        assert metrics["tokens/response"] * 2 == 2 * tokens
        # Four passes over the language model (rollout, reference, two updates), none over a frame but the first.
        assert metrics["frames/decoded"] == metrics["frames/encoded"] == 4 * 3
        if budget == 4000:
            prompts = metrics["tokens/prompt"] * (1 if layout == "shared_prefix" else 4)
            expected = metrics["tokens/prompt"] + tokens + 3 * (prompts + tokens)
            assert metrics["tokens/llm_forward"] == expected
        assert metrics["rollout/logprob_abs_diff_max"] < 1e-4
        first_kl = torch.cat(
            [torch.exp(r - o) - (r - o) - 1 for o, r in zip(old_logprobs, ref_logprobs, strict=True)]
        )
        expected = (first_kl.sum() + torch.cat(kls).sum()) / (2 * tokens)
        assert metrics["grpo/kl"] == pytest.approx(expected.item(), rel=1e-4)
        assert metrics["grpo/clip_fraction"] == pytest.approx(clipped / (2 * tokens), abs=1.5 / (2 * tokens))


def test_groups_without_variance_leave_the_weights_alone(world):
    config = grpo_config(
        world, "flat", reward={"functions": [], "function_weights": [], "accuracy_weight": 1.0}
    )
    with open_session(config, max_prompt_tokens=50) as session:
        engine = MegatronEngine(session.model, session.tokenizer, session.topology)
        before = session.optimizer.master.clone()
        metrics = GrpoTrainer(session, engine, Scorer(config.reward)).train_step(1)
        assert metrics["reward/mean"] == 0 and metrics["grpo/zero_std_groups"] == 4
        assert metrics["optimizer/skipped_updates"] == 1
        assert torch.equal(session.optimizer.master, before)
