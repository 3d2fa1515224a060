"""Training steps on random prompts, frames and upstream gradients, and the comparison of their results."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megavila.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavila.models import VisionLanguageModel, build_model
from megavila.mrsp.layout import Group, LayoutKind, build_layout
from megavila.mrsp.logprobs import response_logprobs
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.models.hf_reference import hf_gradients, randomize
from tests.mrsp.prompts import make_prompt, make_responses

TEMPERATURE = 0.7
TOKENS_PER_FRAME = 4

# Each case: per group the text before the videos, frames of each video, text after, and response lengths.
GRID: dict[str, list[tuple[int, list[int], int, list[int]]]] = {
    "one response": [(3, [2], 2, [5])],
    "odd": [(7, [3], 4, [1, 9, 33, 2, 7])],
    "empty responses": [(1, [1], 0, [0, 3, 0]), (4, [], 0, [0, 2])],
    "short text": [(1, [], 0, [2, 1]), (2, [], 0, [0, 9])],
    "two videos": [(5, [1, 4], 3, [11, 6, 1])],
    "mixed": [(2, [1], 1, [3, 1, 4]), (9, [], 0, [1, 5]), (0, [2, 1], 6, [2, 0, 6]), (1, [], 0, [7])],
    "long": [(31, [6], 40, [63, 17, 97])],
}


def build(
    topology: Topology, dtype: str, recompute: str = "none", *, offload: bool = False
) -> VisionLanguageModel:
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
        recompute=recompute,  # type: ignore[arg-type]
        offload_activations=offload,
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


def make_step(name: str) -> Step:
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
