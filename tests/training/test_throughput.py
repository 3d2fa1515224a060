"""Operations of a step: each pass counted for what it is, whatever the layout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavila.config import LanguageConfig, ModelConfig, VisionConfig
from megavila.models.flops import ModelFlops
from megavila.mrsp.layout import Group, build_layout
from megavila.runtime.platform import Platform
from megavila.training.tally import Tally
from megavila.training.throughput import ModelWork, throughput
from tests.mrsp.prompts import make_prompt, make_responses

CONFIG = ModelConfig(
    language=LanguageConfig(
        hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_hidden_size=24, vocab_size=61
    ),
    vision=VisionConfig(
        hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, image_size=28, patch_size=14
    ),
)
TWO_RANKS: Any = SimpleNamespace(world_size=2)


def work(*, frozen: bool = False) -> ModelWork:
    language = torch.nn.Linear(2, 2).requires_grad_(not frozen)
    model: Any = SimpleNamespace(config=CONFIG, language=language)
    return ModelWork(model)


def total(tally: Tally) -> float:
    return tally._totals["model_flops"]


def test_rollout_costs_what_one_pass_over_its_shared_prefix_costs() -> None:
    lengths = [3, 0, 5]
    group = Group(make_prompt(4, [2, 1], 3, seed=0), make_responses(lengths, seed=0))
    sampled, trained = Tally(), Tally()
    work().count_rollout(group.prompt_tokens, lengths, sampled)
    work().count_layout(build_layout([group], "shared_prefix"), trained, grad=False)
    assert total(sampled) == total(trained) > 0


def test_repeated_layout_costs_its_sequences_one_by_one() -> None:
    lengths = [3, 5]
    group = Group(make_prompt(4, [2], 3, seed=1), make_responses(lengths, seed=1))
    repeated, alone = Tally(), Tally()
    work().count_layout(build_layout([group], "repeated"), repeated, grad=False)
    for tokens in lengths:
        work().count_rollout(group.prompt_tokens, [tokens], alone)
    assert total(repeated) == pytest.approx(total(alone), rel=1e-12)


@pytest.mark.parametrize(("frozen", "factor"), [(False, 3), (True, 2)])
def test_backward_pass(frozen: bool, factor: int) -> None:
    layout = build_layout(
        [Group(make_prompt(4, [2], 3, seed=2), make_responses([4], seed=2))], "shared_prefix"
    )
    forward, both = Tally(), Tally()
    work(frozen=frozen).count_layout(layout, forward, grad=False)
    work(frozen=frozen).count_layout(layout, both, grad=True)
    assert total(both) == factor * total(forward)


def test_frames() -> None:
    tally = Tally()
    work().count_frames(5, 2, tally)
    assert total(tally) == ModelFlops(CONFIG).vision(5 + 2 * 2)


def test_rate_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"model_flops": 8e12, "reward/mean": 1.0}
    assert throughput(metrics, 4.0, TWO_RANKS, Platform("cpu")) == {"reward/mean": 1.0, "tflops_per_gpu": 1.0}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert throughput(metrics, 4.0, TWO_RANKS, Platform("cuda"))["mfu"] == pytest.approx(1 / 989)
