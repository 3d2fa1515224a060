"""VILA and LongVILA: a checkpoint directory with `llm/`, `vision_tower/` and `mm_projector/`."""

import json
from pathlib import Path
from typing import Any

import torch

from megavila.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavila.models.families import siglip
from megavila.models.families.family import Family
from megavila.models.families.qwen_decoder import decoder_mappings, read_decoder_config, write_decoder_config
from megavila.models.initializers import lecun_normal, normal, ones, zeros
from megavila.models.mapping import Mapping, Replicated
from megavila.runtime.errors import MegavilaError

_LLM, _TOWER, _PROJECTOR = "llm.", "vision_tower.", "mm_projector."


def _mappings(config: ModelConfig) -> list[Mapping]:
    assert config.language is not None
    mappings = decoder_mappings(config.language, _LLM, config.init_std)
    if config.vision is not None:
        mappings += siglip.siglip_mappings(config.vision, _TOWER)
        mappings += _projector_mappings(config.projector.kind, config.vision.hidden_size, config)
    return mappings


def _projector_mappings(kind: str, c: int, config: ModelConfig) -> list[Mapping]:
    assert config.language is not None
    hidden = config.language.hidden_size
    # (index in `layers`, output size, input size or None for a LayerNorm)
    if kind == "linear":
        layers = [(0, hidden, c)]
    elif kind == "mlp2x_gelu":
        layers = [(0, hidden, c), (2, hidden, hidden)]
    elif kind == "mlp_downsample_3x3_fix":
        layers = [
            (1, 9 * c, None),
            (2, 3 * c, 9 * c),
            (4, 3 * c, None),
            (5, hidden, 3 * c),
            (7, hidden, hidden),
        ]
    else:
        layers = [(1, 4 * c, None), (2, hidden, 4 * c), (4, hidden, hidden)]
    mappings: list[Mapping] = []
    last = layers[-1][0]
    for index, rows, columns in layers:
        native = f"projector.layers.{index}"
        # VILA's linear projector is a single module without a number.
        hf = f"{_PROJECTOR}layers" if kind == "linear" else f"{_PROJECTOR}layers.{index}"
        shape, init = ((rows,), ones) if columns is None else ((rows, columns), lecun_normal)
        if index == last:
            init = normal(config.init_std)
        mappings.append(Replicated(f"{native}.weight", (f"{hf}.weight",), (shape,), init))
        mappings.append(Replicated(f"{native}.bias", (f"{hf}.bias",), ((rows,),), zeros))
    return mappings


def _is_unused(config: ModelConfig, name: str) -> bool:
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return config.vision is not None and siglip.is_unused(config.vision, name, _TOWER)


def _constants(config: ModelConfig) -> dict[str, torch.Tensor]:
    if config.vision is None or config.vision.post_norm:
        return {}
    # Every SiglipVisionModel has a final norm; the features are read before it.
    norm = f"{_TOWER}vision_model.post_layernorm"
    width = config.vision.hidden_size
    return {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}


def _canonical_name(name: str) -> str:
    # transformers 5 writes SigLIP's names without `vision_model`, which older versions and VILA have.
    if name.startswith(_TOWER) and not name.startswith(f"{_TOWER}vision_model."):
        return f"{_TOWER}vision_model.{name.removeprefix(_TOWER)}"
    return name


def _read_config(directory: Path) -> tuple[LanguageConfig, VisionConfig | None, ProjectorConfig]:
    top = _read_json(directory / "config.json")
    language = read_decoder_config(_part_config(directory, top, "llm", "llm_cfg"))
    if not (directory / "vision_tower").is_dir():
        return language, None, ProjectorConfig()
    projector = _part_config(directory, top, "mm_projector", "mm_projector_cfg")
    vision = siglip.read_siglip_config(
        _part_config(directory, top, "vision_tower", "vision_tower_cfg"),
        feature_layer=top.get("mm_vision_select_layer", -2),
        post_norm=top.get("mm_vision_post_norm", False),
    )
    pool_sizes = (top.get("video_encoder") or {}).get("pool_sizes", [[1, 1, 1]])
    if len(pool_sizes) != 1 or pool_sizes[0][1:] != [1, 1]:
        raise MegavilaError(
            f"pool_sizes {pool_sizes} of {directory}: only pooling over time, [[k, 1, 1]], is supported"
        )
    return (
        language,
        vision,
        ProjectorConfig(kind=projector["mm_projector_type"], temporal_pooling=pool_sizes[0][0]),
    )


def _part_config(directory: Path, top: dict[str, Any], folder: str, key: str) -> dict[str, Any]:
    path = directory / folder / "config.json"
    values = _read_json(path) if path.exists() else top.get(key)
    if not isinstance(values, dict):
        raise MegavilaError(
            f"{path} does not exist and config.json has no {key}: {directory} is not a VILA checkpoint"
        )
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise MegavilaError(
            f"{path} does not exist; model.path must be a VILA checkpoint directory"
        ) from None
    except json.JSONDecodeError as error:
        raise MegavilaError(f"{path} is not valid JSON: {error}") from None


def _write_config(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    assert config.language is not None
    llm = write_decoder_config(config.language, dtype)
    top: dict[str, Any] = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "hidden_size": config.language.hidden_size,
        "llm_cfg": llm,
        "torch_dtype": dtype,
    }
    files = {"config.json": top, "llm/config.json": llm}
    if config.vision is None:
        return files
    tower = siglip.write_siglip_config(config.vision, dtype)
    projector = {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": config.projector.kind,
        "torch_dtype": dtype,
    }
    top |= {
        "vision_tower_cfg": tower,
        "mm_projector_cfg": projector,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_post_norm": config.vision.post_norm,
        "image_aspect_ratio": "resize",
    }
    if config.projector.temporal_pooling > 1:
        top["video_encoder"] = {
            "_target_": "llava.model.encoders.TSPVideoEncoder",
            "pool_sizes": [[config.projector.temporal_pooling, 1, 1]],
        }
    size = config.vision.image_size
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": size, "width": size},
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
    }
    return files | {
        "vision_tower/config.json": tower,
        "vision_tower/preprocessor_config.json": preprocessor,
        "mm_projector/config.json": projector,
    }


VILA = Family(
    name="vila",
    parts={"llm": _LLM, "vision_tower": _TOWER, "mm_projector": _PROJECTOR},
    mappings=_mappings,
    is_unused=_is_unused,
    constants=_constants,
    canonical_name=_canonical_name,
    read_config=_read_config,
    write_config=_write_config,
)
