"""Counted operations against torch's own count of transformers' models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from megavila.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavila.models.flops import ModelFlops
from megavila.models.projector import Projector


def counted(module: torch.nn.Module, *arguments: torch.Tensor, **named: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*arguments, **named)
    return counter.get_total_flops()


def language(**changes: int) -> LanguageConfig:
    sizes = {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "ffn_hidden_size": 80}
    return LanguageConfig(**{**sizes, "vocab_size": 101, **changes})


@pytest.mark.parametrize("head_dim", [8, 16])
def test_language_model(head_dim: int) -> None:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=head_dim,
            intermediate_size=80,
            vocab_size=101,
            attn_implementation="eager",
        )
    )
    tokens = 17
    expected = counted(model, torch.zeros(1, tokens, dtype=torch.long))
    # The eager implementation multiplies hidden pairs too.
    flops = ModelFlops(ModelConfig(language=language(head_dim=head_dim)))
    assert flops.language(tokens, tokens * tokens, tokens) == expected


def test_tower_and_projector() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            **sizes, image_size=35, patch_size=7, vision_use_head=False, attn_implementation="eager"
        )
    )
    frames = 4
    vision = VisionConfig(
        hidden_size=24,
        num_layers=3,
        num_heads=2,
        intermediate_size=40,
        image_size=35,
        patch_size=7,
        feature_layer=-1,
    )
    config = ModelConfig(
        language=language(), vision=vision, projector=ProjectorConfig(kind="mlp_downsample_3x3_fix")
    )
    projector = Projector("mlp_downsample_3x3_fix", 24, 48, dtype=torch.float32)
    expected = counted(tower, torch.zeros(frames, 3, 35, 35)) + counted(
        projector, torch.zeros(frames, 25, 24)
    )
    assert ModelFlops(config).vision(frames) == expected
    assert ModelFlops(ModelConfig(language=language())).vision(frames) == 0
