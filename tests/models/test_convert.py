"""Weights in and out under Hugging Face names, and what goes wrong with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, SiglipVisionModel

from megavila.config import LanguageConfig, ModelConfig
from megavila.models import (
    VisionLanguageModel,
    build_model,
    convert,
    export_hf,
    load_hf,
    read_hf_config,
    resolve_config,
    save_hf,
)
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.models.hf_reference import CASES, hf_decoder, hf_tower, our_decoder, randomize
from tests.models.tensor_parallel_cases import vlm_config


def _model(topology: Topology, **changes: Any) -> VisionLanguageModel:
    model = build_model(vlm_config(**changes), topology, get_platform("cpu"))
    randomize(model, 9)
    return model


def _state(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export_hf(model)}


@pytest.mark.parametrize("case", CASES[:3], ids=["qwen2", "qwen3", "tied"])
def test_decoder_goes_out_as_it_came_in(case: Any, topology: Topology) -> None:
    hf = hf_decoder(case)
    exported = dict(export_hf(our_decoder(case, topology, hf)))
    parameters = {f"llm.{name}": parameter for name, parameter in hf.named_parameters()}
    assert exported.keys() == parameters.keys()
    assert all(torch.equal(exported[name], parameter) for name, parameter in parameters.items())


def test_tower_goes_out_as_it_came_in_without_what_features_do_not_need(topology: Topology) -> None:
    model = _model(topology)
    assert model.config.vision is not None
    hf = hf_tower(model.config.vision)
    load_hf(
        model, _state(model) | {f"vision_tower.{name}": tensor for name, tensor in hf.state_dict().items()}
    )
    theirs = {f"vision_tower.vision_model.{name}": tensor for name, tensor in hf.state_dict().items()}
    exported = {name: t for name, t in export_hf(model) if name.startswith("vision_tower.")}
    assert len(exported) == 3 + 2 * 16
    assert all(torch.equal(theirs[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize("max_file_bytes", [1 << 30, 4000])
def test_directory_loads_in_transformers_and_here(
    max_file_bytes: int, tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", max_file_bytes)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "config.json").write_text("{}")
    model = _model(topology)
    save_hf(model, tmp_path / "out", tokenizer)
    state = _state(model)

    llm: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm", dtype=torch.float32)
    assert type(llm).__name__ == "Qwen3ForCausalLM" and llm.config.rope_parameters["rope_theta"] == 1e6
    assert all(torch.equal(state[f"llm.{name}"], tensor) for name, tensor in llm.state_dict().items())
    tower: Any
    tower, loading = SiglipVisionModel.from_pretrained(
        tmp_path / "out" / "vision_tower", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    frames = torch.randint(0, 256, (2, 3, 21, 21), dtype=torch.uint8)
    features = tower((frames / 255 - 0.5) / 0.5, output_hidden_states=True).hidden_states[-1]
    assert model.projector is not None
    torch.testing.assert_close(model.projector(features), model.encode_frames(frames))
    assert (tmp_path / "out" / "llm" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "out" / "llm" / "config.json").read_text())["model_type"] == "qwen3"
    assert not list(tmp_path.glob("*.partial"))
    shards = len(list((tmp_path / "out" / "llm").glob("*.safetensors")))
    assert shards > 1 if max_file_bytes == 4000 else shards == 1

    config = ModelConfig(path=str(tmp_path / "out"))
    loaded = build_model(config, topology, get_platform("cpu"))
    assert all(torch.equal(state[name], tensor) for name, tensor in export_hf(loaded))
    assert resolve_config(config).language == model.config.language
    assert torch.equal(loaded.encode_frames(frames), model.encode_frames(frames))
    with pytest.raises(MegavilaError, match="exists already"):
        save_hf(model, tmp_path / "out")


def test_architecture_survives_a_directory(tmp_path: Path, topology: Topology) -> None:
    config = vlm_config()
    assert config.vision is not None
    config = replace(
        config,
        vision=replace(config.vision, feature_layer=-1, post_norm=True),
        projector=replace(config.projector, kind="mlp_downsample_3x3_fix", temporal_pooling=8),
    )
    model = build_model(config, topology, get_platform("cpu"))
    save_hf(model, tmp_path / "out")
    assert read_hf_config(tmp_path / "out") == (config.language, config.vision, config.projector)


def test_text_only_model_has_a_directory_too(tmp_path: Path, topology: Topology) -> None:
    model = _model(topology, vision=None)
    save_hf(model, tmp_path / "out")
    loaded = build_model(ModelConfig(path=str(tmp_path / "out")), topology, get_platform("cpu"))
    assert loaded.vision is None
    assert all(torch.equal(tensor, dict(export_hf(model))[name]) for name, tensor in export_hf(loaded))


def test_wrong_checkpoints_change_nothing(topology: Topology) -> None:
    model = _model(topology)
    before = _state(model)
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    missing = {name: tensor for name, tensor in state.items() if "k_norm" not in name}
    with pytest.raises(
        MegavilaError, match=r"lacks 2 tensors of the model, first llm\.model\.layers\.0\.self_attn\.k_norm"
    ):
        load_hf(model, missing)
    with pytest.raises(
        MegavilaError, match=r"1 tensors the model has no place for, first llm\.model\.layers\.9\.x"
    ):
        load_hf(model, state | {"llm.model.layers.9.x": torch.zeros(1)})
    with pytest.raises(MegavilaError, match=r"lm_head\.weight has shape \(60, 32\) in the checkpoint"):
        load_hf(model, state | {"llm.lm_head.weight": torch.zeros(60, 32)})
    assert all(torch.equal(before[name], tensor) for name, tensor in export_hf(model))


def test_tied_output_layer_must_equal_the_embedding(topology: Topology) -> None:
    model = our_decoder(CASES[2], topology, hf_decoder(CASES[2]))
    state = _state(model)
    load_hf(model, state | {"llm.lm_head.weight": state["llm.model.embed_tokens.weight"].clone()})
    with pytest.raises(MegavilaError, match="no place for, first llm.lm_head.weight"):
        load_hf(model, state | {"llm.lm_head.weight": torch.zeros(203, 64)})


def test_directories_that_are_no_checkpoints(tmp_path: Path, topology: Topology) -> None:
    def build(path: Path) -> None:
        build_model(ModelConfig(path=str(path)), topology, get_platform("cpu"))

    with pytest.raises(MegavilaError, match="must be a VILA checkpoint directory"):
        build(tmp_path / "nowhere")
    save_hf(_model(topology), tmp_path / "out")
    weights = tmp_path / "out" / "llm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MegavilaError, match="model.safetensors cannot be read"):
        build(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(MegavilaError, match="not valid JSON"):
        build(tmp_path / "out")
    with pytest.raises(MegavilaError, match="unknown model family 'nope'"):
        build_model(vlm_config(family="nope"), topology, get_platform("cpu"))


def test_no_architecture_has_bias_and_qk_norm(tmp_path: Path, topology: Topology) -> None:
    language = LanguageConfig(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        ffn_hidden_size=16,
        vocab_size=11,
        qk_norm=True,
        qkv_bias=True,
    )
    model = build_model(ModelConfig(language=language), topology, get_platform("cpu"))
    with pytest.raises(MegavilaError, match="no Hugging Face architecture"):
        save_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
