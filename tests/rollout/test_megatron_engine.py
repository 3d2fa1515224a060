"""The Megatron engine against transformers' generate and against full forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megavila.config import ModelConfig
from megavila.data.prompt import Prompt
from megavila.models import AttentionContext, VisionLanguageModel, build_model
from megavila.rollout.megatron import MegatronEngine
from megavila.rollout.protocol import Response, RolloutError, SamplingParams
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology, shutdown
from tests.distributed import run_ranks
from tests.models.hf_reference import LanguageCase, causal, hf_decoder, our_decoder, start
from tests.rollout.engine_fakes import VOCAB, Pieces, make_prompt

CASES = [
    LanguageCase(),
    LanguageCase(num_kv_heads=4),
    LanguageCase(family="qwen3", num_kv_heads=1, tied=True),
]
LENGTHS = [(1, 0), (17, 0), (33, 9), (5, 5), (64, 20)]
# Any of these eleven tokens ends a response: with random weights responses then end at all lengths.
ENDS = tuple(Pieces().decode([i]) for i in range(0, VOCAB, 19))


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start()
    shutdown()


@pytest.fixture(scope="module", params=CASES, ids=str)
def models(request: pytest.FixtureRequest, topology: Topology) -> tuple[Any, VisionLanguageModel]:
    hf = hf_decoder(request.param).eval()
    return hf, our_decoder(request.param, topology, hf)


def requests(count: int = len(LENGTHS)) -> tuple[list[Prompt], list[Tensor | None], list[int]]:
    made = [
        make_prompt(*LENGTHS[i % len(LENGTHS)][:1], seed=i, media=LENGTHS[i % len(LENGTHS)][1])
        for i in range(count)
    ]
    return [prompt for prompt, _ in made], [rows for _, rows in made], [1000 + i for i in range(count)]


def hf_embeddings(hf: Any, prompt: Prompt, rows: Tensor | None) -> Tensor:
    embeddings = hf.get_input_embeddings()(prompt.token_ids).clone()
    if rows is not None:
        is_media = prompt.media_index >= 0
        embeddings[is_media] = rows[prompt.media_index[is_media]]
    return embeddings[None]


@torch.no_grad()
def hf_logits(hf: Any, prompt: Prompt, rows: Tensor | None, response: Response) -> Tensor:
    """(R, vocab) logits that predict the response's tokens, from one forward pass over everything."""
    embeddings = hf_embeddings(hf, prompt, rows)
    embeddings = torch.cat([embeddings, hf.get_input_embeddings()(response.token_ids)[None]], dim=1)
    return hf(inputs_embeds=embeddings).logits[0, len(prompt.token_ids) - 1 : -1]


def tokens(groups: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids.tolist() for response in group] for group in groups]


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_greedy_equals_transformers_generate(models: Any, topology: Topology, group_size: int) -> None:
    hf, model = models
    prompts, rows, seeds = requests()
    params = SamplingParams(max_tokens=13, temperature=0, group_size=group_size)
    groups = MegatronEngine(model, Pieces(), topology).generate(prompts, rows, params, seeds)
    for prompt, own_rows, group in zip(prompts, rows, groups, strict=True):
        expected = hf.generate(
            inputs_embeds=hf_embeddings(hf, prompt, own_rows),
            attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.long),
            max_new_tokens=13,
            do_sample=False,
            eos_token_id=Pieces().eos_id,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = expected.sequences[0]
        logprobs = torch.stack(expected.logits, 1)[0].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert len(group) == group_size
        for response in group:
            assert response.token_ids.tolist() == ids.tolist()
            torch.testing.assert_close(response.logprobs, logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 2, 90])
def test_logprobs_equal_a_full_forward_pass(models: Any, topology: Topology, max_tokens: int) -> None:
    """90 tokens outgrow the first cache; stop strings make rows end at different lengths and the batch
    shrink.
    """
    hf, model = models
    prompts, rows, seeds = requests(7)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.8,
        top_p=0.95,
        top_k=150,
        group_size=5,
        stop=ENDS[: 2 if max_tokens > 2 else 0],
    )
    groups = MegatronEngine(model, Pieces(), topology).generate(prompts, rows, params, seeds)
    lengths = set()
    for prompt, own_rows, group in zip(prompts, rows, groups, strict=True):
        assert len({tuple(response.token_ids.tolist()) for response in group}) > 1
        for response in group:
            logits = hf_logits(hf, prompt, own_rows, response) / params.temperature
            expected = logits.log_softmax(-1).gather(1, response.token_ids[:, None])[:, 0]
            torch.testing.assert_close(response.logprobs, expected, rtol=1e-5, atol=1e-5)
            assert len(response.token_ids) == max_tokens or response.finish_reason == "stop"
            lengths.add(len(response.token_ids))
    assert len(lengths) > 8 or max_tokens <= 2


def test_samples_do_not_depend_on_what_else_is_decoded(models: Any, topology: Topology) -> None:
    _, model = models
    prompts, rows, seeds = requests(7)
    params = SamplingParams(max_tokens=40, top_p=0.9, group_size=4, stop=ENDS)
    together = MegatronEngine(model, Pieces(), topology).generate(prompts, rows, params, seeds)
    alone = [
        MegatronEngine(model, Pieces(), topology).generate([prompts[i]], [rows[i]], params, [seeds[i]])[0]
        for i in reversed(range(7))
    ][::-1]
    split = MegatronEngine(model, Pieces(), topology, max_batch_tokens=500, max_prefill_tokens=40).generate(
        prompts, rows, params, seeds
    )
    assert tokens(together) == tokens(alone) == tokens(split)
    for group, other in zip(together, alone, strict=True):
        for response, same in zip(group, other, strict=True):
            torch.testing.assert_close(response.logprobs, same.logprobs, rtol=1e-5, atol=1e-5)
    wider = SamplingParams(max_tokens=44, top_p=0.9, group_size=6, stop=ENDS)
    first_four = [
        [response[:40] for response in group[:4]]
        for group in tokens(MegatronEngine(model, Pieces(), topology).generate(prompts, rows, wider, seeds))
    ]
    assert first_four == tokens(together)
    reseeded = MegatronEngine(model, Pieces(), topology).generate(
        prompts, rows, params, [seed + 1 for seed in seeds]
    )
    assert tokens(reseeded) != tokens(together)


@pytest.fixture(scope="module")
def one_model(topology: Topology) -> VisionLanguageModel:
    return our_decoder(LanguageCase(), topology, hf_decoder(LanguageCase()))


def draw_freely(model: VisionLanguageModel, topology: Topology) -> list[int]:
    """The 30 tokens of a response that nothing ends early."""
    prompt, rows = make_prompt(12, seed=3)
    params = SamplingParams(max_tokens=30)
    ((response,),) = MegatronEngine(model, Pieces(eos_id=-1), topology).generate(
        [prompt], [rows], params, [5]
    )
    assert response.finish_reason == "length" and len(response.token_ids) == 30
    return response.token_ids.tolist()


def draw_until(
    model: VisionLanguageModel,
    topology: Topology,
    tokenizer: Pieces,
    stop: tuple[str, ...] = (),
    max_tokens: int = 30,
) -> Response:
    prompt, rows = make_prompt(12, seed=3)
    params = SamplingParams(max_tokens=max_tokens, stop=stop)
    ((response,),) = MegatronEngine(model, tokenizer, topology).generate([prompt], [rows], params, [5])
    return response


def test_end_of_sequence_stays_in_the_tokens_and_out_of_the_text(
    one_model: VisionLanguageModel, topology: Topology
) -> None:
    free = draw_freely(one_model, topology)
    place = 11
    assert free[place] not in free[:place]
    response = draw_until(one_model, topology, Pieces(eos_id=free[place]))
    assert response.token_ids.tolist() == free[: place + 1]
    assert response.finish_reason == "stop"
    assert response.text == Pieces(eos_id=-1).decode(free[:place])


def test_an_empty_response_is_its_end_of_sequence_token(
    one_model: VisionLanguageModel, topology: Topology
) -> None:
    free = draw_freely(one_model, topology)
    response = draw_until(one_model, topology, Pieces(eos_id=free[0]))
    assert (response.token_ids.tolist(), response.text, response.finish_reason) == (free[:1], "", "stop")
    assert response.logprobs.shape == (1,)


def test_a_stop_string_over_several_tokens_ends_the_text(
    one_model: VisionLanguageModel, topology: Topology
) -> None:
    free = draw_freely(one_model, topology)
    # Tokens 7, 8, 9 spell "x</answer>\n": the stop string begins inside one token and ends inside another.
    tokenizer = Pieces(eos_id=-1, replaced=((free[7], "x</"), (free[8], "answer"), (free[9], ">\n")))
    response = draw_until(one_model, topology, tokenizer, stop=("never", "</answer>"))
    assert response.token_ids.tolist() == free[:10]
    assert response.text == tokenizer.decode(free[:7]) + "x</answer>"
    assert response.finish_reason == "stop"


def test_stopping_with_the_last_token_is_a_stop(one_model: VisionLanguageModel, topology: Topology) -> None:
    free = draw_freely(one_model, topology)
    stop = (Pieces().decode(free[4:5]),)
    assert draw_until(one_model, topology, Pieces(eos_id=-1), stop, max_tokens=5).finish_reason == "stop"
    assert draw_until(one_model, topology, Pieces(eos_id=-1), stop, max_tokens=4).finish_reason == "length"


def test_counts_say_what_was_computed_and_what_was_shared(
    one_model: VisionLanguageModel, topology: Topology
) -> None:
    prompts, rows, seeds = requests()
    engine = MegatronEngine(one_model, Pieces(eos_id=-1), topology)
    engine.generate(prompts, rows, SamplingParams(max_tokens=6, group_size=3), seeds)
    length = sum(len(prompt.token_ids) for prompt in prompts)
    counts = engine.take_counts()
    assert (counts.prefill_tokens, counts.reused_prompt_tokens) == (length, 2 * length)
    # The first of 6 tokens comes from the prompt's last hidden state.
    assert counts.decode_tokens == 5 * 3 * len(prompts)
    assert engine.take_counts().prefill_tokens == 0


def test_training_goes_on_after_generating(one_model: VisionLanguageModel, topology: Topology) -> None:
    prompts, rows, seeds = requests(2)
    one_model.train()
    frozen = one_model.language.gpt.decoder.layers[0]
    frozen.eval()
    groups = MegatronEngine(one_model, Pieces(), topology).generate(
        prompts, rows, SamplingParams(max_tokens=5), seeds
    )
    assert one_model.training and not frozen.training and not any(m.training for m in frozen.modules())
    response = groups[0][0]
    hidden = one_model(
        one_model.language.embed(response.token_ids),
        AttentionContext(torch.arange(len(response.token_ids)), causal),
    )
    logprobs, _ = one_model.token_logprobs(hidden, response.token_ids)
    ((logprobs - response.logprobs) * response.logprobs.exp()).sum().backward()
    gradient = next(one_model.parameters()).grad
    assert gradient is not None and gradient.abs().sum() > 0
    one_model.zero_grad()


def test_three_dimensional_positions_continue_at_next_position(topology: Topology) -> None:
    language = replace(LanguageCase().config(), mrope_section=(2, 3, 3))
    model = build_model(ModelConfig(language=language, dtype="float32"), topology, get_platform("cpu"))
    spatial, _ = make_prompt(21, seed=1, position_axes=3)
    plain, _ = make_prompt(8, seed=2)
    params = SamplingParams(max_tokens=9, group_size=2)
    groups = MegatronEngine(model, Pieces(eos_id=-1), topology).generate(
        [spatial, plain], [None, None], params, [1, 2]
    )
    for prompt, group in zip((spatial, plain), groups, strict=True):
        for response in group:
            positions = (
                prompt.position_ids if prompt.position_ids.dim() == 2 else prompt.position_ids.expand(3, -1)
            )
            further = (prompt.next_position + torch.arange(9)).expand(3, -1)
            everything = torch.cat([prompt.token_ids, response.token_ids])
            context = AttentionContext(torch.cat([positions, further], dim=1), causal)
            with torch.no_grad():
                hidden = model(model.language.embed(everything), context)[len(prompt.token_ids) - 1 : -1]
                expected, _ = model.token_logprobs(hidden, response.token_ids)
            torch.testing.assert_close(response.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_requests_that_do_not_fit_are_explained(one_model: VisionLanguageModel, topology: Topology) -> None:
    engine = MegatronEngine(one_model, Pieces(), topology)
    prompts, rows, seeds = requests()
    params = SamplingParams(max_tokens=3)
    with pytest.raises(RolloutError, match="5 prompts, 5 media rows and 4 seeds"):
        engine.generate(prompts, rows, params, seeds[:4])
    with pytest.raises(RolloutError, match="prompt 2 .*holds 9 media positions but was given 0"):
        engine.generate(prompts, [None] * 5, params, seeds)
    assert engine.generate([], [], params, []) == []


def two_rank_tokens(case: LanguageCase, topology: Topology) -> list[Any]:
    model = our_decoder(case, topology, hf_decoder(case))
    prompts, rows, seeds = requests(6)
    params = SamplingParams(max_tokens=30, temperature=1.1, top_p=0.9, group_size=3, stop=ENDS)
    groups = MegatronEngine(model, Pieces(), topology, max_batch_tokens=400).generate(
        prompts, rows, params, seeds
    )
    return [tokens(groups), [[response.logprobs for response in group] for group in groups]]


def on_two_ranks(rank: int) -> list[Any]:
    return two_rank_tokens(CASES[0], start(tensor=2))


def test_two_tensor_parallel_ranks_draw_the_same(topology: Topology) -> None:
    expected_tokens, expected_logprobs = two_rank_tokens(CASES[0], topology)
    for ids, logprobs in run_ranks(on_two_ranks, 2):
        assert ids == expected_tokens
        for group, expected_group in zip(logprobs, expected_logprobs, strict=True):
            for own, expected in zip(group, expected_group, strict=True):
                torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
