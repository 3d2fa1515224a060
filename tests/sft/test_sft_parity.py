"""The SFT trainer's loss and gradient are those of transformers' Qwen2ForCausalLM with labels."""

import pytest
import torch

import megavila.sft.trainer as trainer_module
from megavila.data.targets import target_text
from megavila.sft.trainer import SftTrainer
from megavila.training.session import open_session
from tests.end_to_end.parity import assert_gradients_equal, hf_language_model, hf_logits
from tests.end_to_end.tiny import sft_config, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sft")
    write_world(directory, rows=5)
    return directory


@pytest.mark.parametrize("budget", [60, 4000])
def test_loss_and_gradient_equal_transformers(world, tmp_path, monkeypatch, budget):
    config = sft_config(
        world,
        f"parity{budget}",
        sft={"batch_size": 5, "max_tokens_per_microbatch": budget},
        model={"train_projector": False},
    )
    monkeypatch.setattr(trainer_module, "apply_update", lambda session, tally: None)
    with open_session(config, max_prompt_tokens=50) as session:
        hf = hf_language_model(session, tmp_path / "hf")
        metrics = SftTrainer(session).train_step(1)
        builder = session.prompts.builder
        losses, count = torch.zeros(()), 0
        for row in session.rows:  # one batch is one epoch, so the order does not matter
            prompt, target = builder.build(row), builder.encode_response(target_text(row))
            logits = hf_logits(hf, prompt, session.encoder.rows([prompt])[0].whole(), target)
            losses = losses + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            count += len(target)
        (losses / count).backward()
        assert metrics["tokens/response"] == count
        assert metrics["sft/loss"] == pytest.approx(losses.item() / count, rel=1e-5)
        assert_gradients_equal(session, hf)


def test_labels_of_one_sequence_are_what_transformers_masks(world, tmp_path, monkeypatch):
    """The same with transformers' own loss: labels -100 on the prompt, its own shift by one."""
    config = sft_config(world, "labels", sft={"batch_size": 1}, model={"train_projector": False})
    monkeypatch.setattr(trainer_module, "apply_update", lambda session, tally: None)
    with open_session(config, max_prompt_tokens=50) as session:
        hf = hf_language_model(session, tmp_path / "hf")
        trainer = SftTrainer(session)
        drawn = []
        monkeypatch.setattr(
            trainer_module, "draw_examples", lambda *a, **k: drawn.extend(draw(*a, **k)) or list(drawn)
        )
        metrics = trainer.train_step(1)
        prompt, media_rows = drawn[0].prompt, drawn[0].media_rows.whole()
        target = session.prompts.builder.encode_response(target_text(prompt.row))
        ids = torch.cat([prompt.token_ids, target])
        embeddings = hf.get_input_embeddings()(ids)
        places = (prompt.media_index >= 0).nonzero().squeeze(1)
        embeddings = embeddings.index_copy(0, places, media_rows[prompt.media_index[places]])
        labels = torch.cat([torch.full_like(prompt.token_ids, -100), target])
        loss = hf(inputs_embeds=embeddings[None], labels=labels[None]).loss
        loss.backward()
        assert metrics["sft/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_gradients_equal(session, hf)


draw = trainer_module.draw_examples


def test_think_fraction_and_hooks(world):
    config = sft_config(world, "think", sft={"batch_size": 5, "think_fraction": 0.0})
    with open_session(config, max_prompt_tokens=50) as session:
        examples = draw(session, 5, trainer_module.Tally())
        texts = [session.tokenizer.decode(t.tolist()) for t in SftTrainer(session)._targets(1, examples)]
        assert sorted(texts) == sorted(
            f"<think> </think> <answer> {e.prompt.row.answer} </answer>" for e in examples
        )

    config = sft_config(world, "hook", sft={"batch_size": 5})
    with open_session(config, max_prompt_tokens=50) as session:
        seen = []

        def rewrite(row, timestamps):
            seen.append(tuple(timestamps))
            return None if row.problem_id == "row2" else "it is red"

        metrics = SftTrainer(session, rewrite).train_step(1)
        assert metrics["sft/left_out"] == 1
        assert all(len(times) == 3 and times[0] < times[1] < times[2] for times in seen)
        assert metrics["tokens/response"] == 4 * len(
            session.prompts.builder.encode_response(
                target_text(session.rows[0], rewrite=lambda r, t: "it is red")
            )
        )
