"""The tower against transformers' SigLIP: features at several layers and every gradient."""

from typing import Any

import pytest
import torch

from megavila.config import LanguageConfig, ModelConfig, VisionConfig
from megavila.models import VisionLanguageModel, build_model, export_hf, load_hf
from megavila.models.families import get_family
from megavila.models.vision import SMALL_FRAME_PATCHES
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.models.hf_reference import hf_tower, relative_error

LANGUAGE = LanguageConfig(hidden_size=32, num_layers=1, num_heads=2, ffn_hidden_size=32, vocab_size=11)


def _tower(
    image_size: int = 31, patch_size: int = 7, feature_layer: int = -2, post_norm: bool = False
) -> VisionConfig:
    return VisionConfig(
        hidden_size=48,
        num_layers=4,
        num_heads=3,
        intermediate_size=80,
        image_size=image_size,
        patch_size=patch_size,
        feature_layer=feature_layer,
        post_norm=post_norm,
    )


@pytest.mark.parametrize(
    "config",
    [
        _tower(),
        _tower(image_size=44, patch_size=4),
        _tower(feature_layer=-1),
        _tower(feature_layer=-1, post_norm=True),
        _tower(feature_layer=-5),
    ],
    ids=["layer-2", "fused-attention", "layer-1", "post-norm", "patches-only"],
)
def test_features_and_gradients_equal_transformers(config: VisionConfig, topology: Topology) -> None:
    hf = hf_tower(config)
    model = build_model(
        ModelConfig(language=LANGUAGE, vision=config, train_vision=True), topology, get_platform("cpu")
    )
    tower = model.vision
    assert tower is not None
    _load_tower(model, hf)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(3, 3, config.image_size, config.image_size, generator=generator)

    out = hf(pixels, output_hidden_states=True)
    expected = out.last_hidden_state if config.post_norm else out.hidden_states[config.feature_layer]
    upstream = torch.randn(expected.shape, generator=generator)
    (expected * upstream).sum().backward()
    features = tower(pixels)
    (features * upstream).sum().backward()

    assert relative_error(features.detach(), expected.detach()) < 1e-5
    gradients = dict(hf.named_parameters())
    checked = 0
    for mapping in get_family("vila").mappings(model.config):
        if mapping.native.startswith("vision."):
            parameter = dict(model.named_parameters())[mapping.native]
            assert parameter.grad is not None
            for name, ours in zip(mapping.hf, mapping.unshard([parameter.grad]), strict=True):
                theirs = gradients[name.removeprefix("vision_tower.vision_model.")].grad
                if "k_proj.bias" in name:  # zero but for rounding: softmax does not see a shift of all keys
                    assert ours.norm() < 1e-4
                else:
                    assert relative_error(ours, theirs) < 1e-5, name
                checked += 1
    assert checked == 3 + 16 * tower.num_blocks + 2 * config.post_norm


def test_both_attention_paths_are_covered() -> None:
    assert _tower().patches_per_side ** 2 <= SMALL_FRAME_PATCHES < _tower(44, 4).patches_per_side ** 2


def test_frames_are_normalised_and_encoded_one_by_one(topology: Topology) -> None:
    config = ModelConfig(language=LANGUAGE, vision=_tower())
    model = build_model(config, topology, get_platform("cpu"), max_frames_per_batch=2)
    frames = torch.randint(0, 256, (5, 3, 31, 31), dtype=torch.uint8)
    encoded = model.encode_frames(frames)
    assert model.vision is not None and model.projector is not None
    pixels = (frames.double() / 255 - 0.5) / 0.5
    expected = torch.cat([model.projector(model.vision(frame[None].float())) for frame in pixels])
    assert encoded.shape == (5, 4, 32)
    assert relative_error(encoded, expected) < 1e-5
    with pytest.raises(MegavilaError, match="must be uint8"):
        model.encode_frames(frames[:, :, :30])
    with pytest.raises(MegavilaError, match="must be uint8"):
        model.encode_frames(frames.float())


def test_recompute_gives_the_same_gradients(topology: Topology) -> None:
    frames = torch.randint(0, 256, (5, 3, 31, 31), dtype=torch.uint8)
    gradients = []
    for recompute in ("none", "full"):
        config = ModelConfig(language=LANGUAGE, vision=_tower(), train_vision=True, recompute=recompute)
        model = build_model(config, topology, get_platform("cpu"), max_frames_per_batch=3)
        encoded = model.encode_frames(frames)
        (encoded * torch.linspace(-1, 1, encoded.numel()).view_as(encoded)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 30
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def _load_tower(model: VisionLanguageModel, hf: Any) -> None:
    state = {
        name: tensor.clone() for name, tensor in export_hf(model) if not name.startswith("vision_tower.")
    }
    load_hf(model, state | {f"vision_tower.{name}": tensor for name, tensor in hf.state_dict().items()})
