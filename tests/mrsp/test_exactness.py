"""One shared prompt against G independent sequences: log-probs and every gradient, tower and projector included."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from megavila.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavila.models import VisionLanguageModel, build_model, export_hf, load_hf
from megavila.mrsp.layout import Group, LayoutKind, build_layout
from megavila.mrsp.logprobs import response_logprobs, response_logprobs_and_entropy
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.models.hf_reference import hf_gradients, randomize

Make = Callable[..., Any]
TEMPERATURE = 0.7
TOKENS_PER_FRAME = 4

# Each case: per group the text before the videos, frames of each video, text after, and response lengths.
GRID: dict[str, list[tuple[int, list[int], int, list[int]]]] = {
    "one response": [(3, [2], 2, [5])],
    "odd": [(7, [3], 4, [1, 9, 33, 2, 7])],
    "empty responses": [(1, [1], 0, [0, 3, 0]), (4, [], 0, [0, 2])],
    "two videos": [(5, [1, 4], 3, [11, 6, 1])],
    "mixed": [(2, [1], 1, [3, 1, 4]), (9, [], 0, [1, 5]), (0, [2, 1], 6, [2, 0, 6]), (1, [], 0, [7])],
    "long": [(31, [6], 40, [63, 17, 97])],
}


def build(topology: Topology, dtype: str) -> VisionLanguageModel:
    config = ModelConfig(
        language=LanguageConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            vocab_size=61,
            rope_theta=10_000.0,
        ),
        vision=VisionConfig(
            hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, image_size=16, patch_size=4
        ),
        projector=ProjectorConfig(kind="mlp_downsample_2x2_fix"),
        train_vision=True,
        dtype=dtype,  # type: ignore[arg-type]
    )
    model = build_model(config, topology, get_platform("cpu"))
    randomize(model, 5)
    return model


@dataclass
class Step:
    groups: list[Group]
    frames: list[Tensor | None]  # per prompt, all its videos' frames
    upstream: Tensor  # random gradient of every log-prob


def make_step(name: str, make_prompt: Make, make_responses: Make) -> Step:
    generator = torch.Generator().manual_seed(7)
    groups, frames = [], []
    for number, (before, videos, after, responses) in enumerate(GRID[name]):
        prompt = make_prompt(before, videos, after, seed=number, tokens_per_frame=TOKENS_PER_FRAME)
        groups.append(Group(prompt, make_responses(responses, number)))
        shape = (sum(videos), 3, 16, 16)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        frames.append(pixels if videos else None)
    targets = sum(group.response_tokens for group in groups)
    return Step(groups, frames, torch.randn(targets, generator=generator, dtype=torch.float64))


def encode(model: VisionLanguageModel, step: Step) -> list[Tensor | None]:
    return [None if f is None else model.encode_frames(f).flatten(0, 1) for f in step.frames]


def gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Of all parameters, then cleared; a part that no path reached is zero."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = hf_gradients(model)
    model.zero_grad(set_to_none=True)
    return grads


def run(model: VisionLanguageModel, step: Step, kind: LayoutKind) -> tuple[Tensor, dict[str, Tensor]]:
    layout = build_layout(step.groups, kind)
    logprobs = response_logprobs(model, layout, encode(model, step), temperature=TEMPERATURE, chunk=5)
    (logprobs * step.upstream).sum().backward()
    return logprobs.detach(), gradients(model)


def one_by_one(model: VisionLanguageModel, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
    """Each response in its own forward and backward pass with its own copy of prompt and video."""
    logprobs, start = [], 0
    for group, frames in zip(step.groups, step.frames, strict=True):
        for response in group.responses:
            alone = Step([Group(group.prompt, (response,))], [frames], step.upstream)
            layout = build_layout(alone.groups, "repeated")
            part = response_logprobs(model, layout, encode(model, alone), temperature=TEMPERATURE)
            (part * step.upstream[start : start + len(response)]).sum().backward()
            logprobs.append(part.detach())
            start += len(response)
    return torch.cat(logprobs), gradients(model)


def assert_equal(
    actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    assert (actual[0] - expected[0]).norm() <= tolerance * expected[0].norm().clamp_min(1e-30)
    assert actual[1].keys() == expected[1].keys()
    whole = torch.stack([grad.norm() for grad in expected[1].values()]).norm()
    for name, grad in expected[1].items():
        # A key bias has no gradient but rounding: softmax does not feel a shift of all scores.
        scale = grad.norm().clamp_min(1e-3 * whole)
        assert (actual[1][name] - grad).norm() <= tolerance * scale, name


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_shared_prefix_equals_independent_sequences(
    name: str, dtype: str, tolerance: float, topology: Topology, make_prompt: Make, make_responses: Make
) -> None:
    model = build(topology, dtype)
    step = make_step(name, make_prompt, make_responses)
    expected = one_by_one(model, step)
    reached = [n for n, grad in expected[1].items() if grad.norm() > 0]
    assert any(n.startswith("llm.") for n in reached) and any("vision" in n for n in reached)
    assert_equal(run(model, step, "shared_prefix"), expected, tolerance)
    assert_equal(run(model, step, "repeated"), expected, tolerance)


@pytest.mark.parametrize("name", GRID)
# transformers computes its norms in fp32 whatever the dtype, so fp64 agrees only to 1e-6.
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_shared_prefix_equals_transformers_on_independent_sequences(
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    topology: Topology,
    make_prompt: Make,
    make_responses: Make,
) -> None:
    model = build(topology, str(dtype).removeprefix("torch."))
    hf = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=61,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    ).to(dtype)
    randomize(hf, 1)
    state = {n: p for n, p in export_hf(model) if not n.startswith("llm.")}
    load_hf(model, state | {f"llm.{n}": p for n, p in hf.state_dict().items()})

    step = make_step(name, make_prompt, make_responses)
    actual, grads = run(model, step, "shared_prefix")
    expected, start = [], 0
    for group, frames in zip(step.groups, step.frames, strict=True):
        for response in group.responses:
            if not len(response):
                continue
            prompt = group.prompt
            rows = hf.model.embed_tokens(torch.cat([prompt.token_ids, response]))
            if frames is not None:
                media = model.encode_frames(frames).flatten(0, 1).detach()
                is_media = (prompt.media_index >= 0).nonzero().squeeze(1)
                rows = rows.index_copy(0, is_media, media[prompt.media_index[is_media]])
            logits = hf(inputs_embeds=rows[None], use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
            logprobs = torch.log_softmax(logits / TEMPERATURE, -1).gather(1, response[:, None]).squeeze(1)
            (logprobs * step.upstream[start : start + len(response)]).sum().backward()
            expected.append(logprobs.detach())
            start += len(response)
    theirs = {f"llm.{n}": p.grad for n, p in hf.named_parameters()}
    ours = {n: grad for n, grad in grads.items() if n.startswith("llm.")}
    assert_equal((actual, ours), (torch.cat(expected), theirs), tolerance)


def test_entropy_comes_with_the_same_logprobs(
    topology: Topology, make_prompt: Make, make_responses: Make
) -> None:
    model = build(topology, "float64")
    step = make_step("mixed", make_prompt, make_responses)
    layout = build_layout(step.groups)
    rows = encode(model, step)
    logprobs, entropy = response_logprobs_and_entropy(model, layout, rows, temperature=TEMPERATURE)
    torch.testing.assert_close(logprobs, response_logprobs(model, layout, rows, temperature=TEMPERATURE))
    hidden = model(
        model.embed(layout.token_ids, layout.media_index, torch.cat([r for r in rows if r is not None])),
        layout.context(),
    )
    logits = hidden[layout.predictor_rows] @ model.language.output_weight().T / TEMPERATURE
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
