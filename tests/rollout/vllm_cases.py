"""Models, prompts and comparisons for the tests of the vLLM engine, on one rank or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavila.config import ModelConfig
from megavila.data.prompt import Prompt
from megavila.models import VisionLanguageModel, build_model
from megavila.mrsp.layout import Group, build_layout
from megavila.mrsp.logprobs import response_logprobs
from megavila.rollout.megatron import MegatronEngine
from megavila.rollout.protocol import Response, SamplingParams
from megavila.rollout.vllm import VllmEngine
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.models.hf_reference import LanguageCase
from tests.models.tensor_parallel_cases import vlm_config
from tests.rollout.engine_fakes import VOCAB, Pieces, make_prompt

# fp32 on both sides; what is left is the order of summation.
TOLERANCE = 1e-4
MAX_TOKENS = 700
# (tokens, of them rows of media): shorter than a block of 32, on its border, and over several of them.
LENGTHS = [(1, 0), (33, 9), (32, 32), (150, 100)]

PARAMS = SamplingParams(max_tokens=12, group_size=3)

CASES = [
    LanguageCase(num_heads=2, num_kv_heads=1, head_dim=32),
    LanguageCase(num_heads=1, num_kv_heads=1, head_dim=64, tied=True),
    LanguageCase(family="qwen3", num_kv_heads=1, head_dim=80),
    LanguageCase(family="qwen3", head_dim=96, tied=True),
    LanguageCase(family="llama", num_kv_heads=4, head_dim=128),
]


def text_model(case: LanguageCase, topology: Topology) -> VisionLanguageModel:
    """A decoder on which every weight matters."""
    model = build_model(ModelConfig(language=case.config(), dtype="float32"), topology, get_platform("cpu"))
    shake(model, 1, scale=0.1)
    return model


def vila_model(topology: Topology) -> VisionLanguageModel:
    """Tower, projector and decoder; a frame becomes the projector's number of rows."""
    config = vlm_config()
    assert config.language is not None
    language = replace(config.language, num_heads=1, num_kv_heads=1, head_dim=32, vocab_size=VOCAB)
    model = build_model(replace(config, language=language), topology, get_platform("cpu"))
    shake(model, 2, scale=0.1)
    return model


@torch.no_grad()
def shake(model: VisionLanguageModel, seed: int, scale: float = 0.03, names: str = "") -> None:
    """A training step's worth of change, or more, in every parameter whose name contains ``names``."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if names in name:
            generator = torch.Generator().manual_seed(1000 * seed + number)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def text_requests() -> tuple[list[Prompt], list[Tensor | None], list[int]]:
    made = [make_prompt(tokens, seed=tokens, media=media) for tokens, media in LENGTHS]
    return [prompt for prompt, _ in made], [rows for _, rows in made], [7 + i for i in range(len(made))]


def rollout(engine: VllmEngine) -> list[tuple[Response, ...]]:
    """Groups of 3 responses of 12 tokens to `text_requests`."""
    prompts, rows, seeds = text_requests()
    return engine.generate(prompts, rows, PARAMS, seeds)


def check_same(groups: Sequence[Sequence[Response]], expected: Sequence[Sequence[Response]]) -> None:
    for group, other in zip(groups, expected, strict=True):
        assert [r.token_ids.tolist() for r in group] == [r.token_ids.tolist() for r in other]
        for response, same in zip(group, other, strict=True):
            assert difference(response.logprobs, same.logprobs) < TOLERANCE


def video_request(model: VisionLanguageModel, frames: Sequence[int], seed: int) -> tuple[Prompt, Tensor]:
    """A prompt about videos of so many random frames, text before, between and after them; and their rows."""
    assert model.config.vision is not None
    side, generator = model.config.vision.image_size, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        encoded = [
            model.media_rows(
                model.encode_frames(
                    torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
                )
            )
            for n in frames
        ]
    parts, start = [torch.full((5,), -1)], 0
    for rows in encoded:
        parts += [torch.arange(start, start + len(rows)), torch.full((4,), -1)]
        start += len(rows)
    media_index = torch.cat(parts)
    prompt, _ = make_prompt(len(media_index), seed)
    prompt.media_index, prompt.num_media_rows = media_index, start  # type: ignore[misc]
    return prompt, torch.cat(encoded)


@torch.no_grad()
def trainer_logprobs(
    model: VisionLanguageModel,
    prompt: Prompt,
    rows: Tensor | None,
    group: Sequence[Response],
    temperature: float,
) -> Tensor:
    """Log-probs of a group's tokens by the path that training takes."""
    layout = build_layout([Group(prompt, tuple(response.token_ids for response in group))])
    return response_logprobs(model, layout, rows, temperature=temperature or 1.0)


def compare(
    engine: VllmEngine,
    prompts: Sequence[Prompt],
    rows: Sequence[Tensor | None],
    seeds: Sequence[int],
) -> float:
    """Greedy tokens equal the Megatron engine's, log-probs (greedy and sampled) both its and the trainer's.

    Returns the largest difference of a log-prob.
    """
    model, worst = engine.model, 0.0
    greedy = SamplingParams(max_tokens=15, temperature=0, group_size=2)
    ours = engine.generate(prompts, rows, greedy, seeds)
    theirs = MegatronEngine(model, engine.tokenizer, engine.topology).generate(prompts, rows, greedy, seeds)
    assert [[r.token_ids.tolist() for r in g] for g in ours] == [
        [r.token_ids.tolist() for r in g] for g in theirs
    ]
    for group, other in zip(ours, theirs, strict=True):
        for response, same in zip(group, other, strict=True):
            assert (response.text, response.finish_reason) == (same.text, same.finish_reason)
            worst = max(worst, difference(response.logprobs, same.logprobs))
    sampled = SamplingParams(max_tokens=15, temperature=0.7, group_size=3)
    for params, groups in ((greedy, ours), (sampled, engine.generate(prompts, rows, sampled, seeds))):
        for prompt, own, group in zip(prompts, rows, groups, strict=True):
            expected = trainer_logprobs(model, prompt, own, group, params.temperature)
            worst = max(worst, difference(torch.cat([r.logprobs for r in group]), expected))
    return worst


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def on_ranks(rank: int, tensor: int) -> dict[str, Any]:
    """Both kinds of engine over the ranks of a run: each replica its own prompts, two updates of the weights."""
    from tests.models.hf_reference import start

    topology = start(tensor=tensor)
    case = LanguageCase(family="qwen3", num_kv_heads=2, head_dim=32)
    model = build_model(
        ModelConfig(language=case.config(), dtype="float32"), topology, get_platform("cpu"), seed=3
    )
    found: dict[str, Any] = {"worst": []}
    prompts, rows, _ = text_requests()
    seeds = [100 * topology.data_rank + i for i in range(len(prompts))]
    with VllmEngine(model, Pieces(), topology, max_tokens=MAX_TOKENS, kv_cache_gib=0.05) as engine:
        for step in range(2):
            shake(model, 10 + step)
            engine.update_weights()
            found["worst"].append(compare(engine, prompts, rows, seeds))
        params = SamplingParams(max_tokens=20, group_size=2)
        groups = engine.generate(prompts, rows, params, seeds)
        found["tokens"] = [[r.token_ids.tolist() for r in group] for group in groups]
    return found


def word_tokenizer(directory: Path) -> Any:
    from megavila.data.tokenizer import build_word_tokenizer, load_tokenizer

    words = " ".join(f"w{i}" for i in range(VOCAB - 8))
    return load_tokenizer(build_word_tokenizer([words], directory))
