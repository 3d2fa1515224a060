"""Parameter mappings and configuration of the SigLIP tower under its Hugging Face names."""

from typing import Any

from megavila.config import VisionConfig
from megavila.models.initializers import lecun_normal, normal, ones, xavier_uniform, zeros
from megavila.models.mapping import Mapping, Replicated, Shape, Stacked
from megavila.runtime.errors import MegavilaError


def num_blocks(config: VisionConfig) -> int:
    """Blocks that are built: those up to the hidden state the projector reads."""
    return config.num_layers + 1 + config.feature_layer


def siglip_mappings(config: VisionConfig, prefix: str) -> list[Mapping]:
    """All parameters of the tower, initialised as transformers does; `prefix`: e.g. "vision_tower."."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    hf = f"{prefix}vision_model"
    tower = "vision"
    mappings: list[Mapping] = [
        Replicated(
            f"{tower}.patch_weight",
            (f"{hf}.embeddings.patch_embedding.weight",),
            ((width, 3, patch, patch),),
            lecun_normal,
        ),
        Replicated(f"{tower}.patch_bias", (f"{hf}.embeddings.patch_embedding.bias",), ((width,),), zeros),
        Replicated(
            f"{tower}.positions",
            (f"{hf}.embeddings.position_embedding.weight",),
            ((config.patches_per_side**2, width),),
            normal(width**-0.5),
        ),
    ]
    for index in range(num_blocks(config)):
        native, layer = f"{tower}.blocks.{index}", f"{hf}.encoder.layers.{index}"
        mappings += _norm(f"{native}.norm1", f"{layer}.layer_norm1", width)
        mappings += _stacked_linear(
            f"{native}.qkv", [f"{layer}.self_attn.{name}_proj" for name in "qkv"], width
        )
        mappings += _linear(f"{native}.out", f"{layer}.self_attn.out_proj", (width, width))
        mappings += _norm(f"{native}.norm2", f"{layer}.layer_norm2", width)
        mappings += _linear(f"{native}.fc1", f"{layer}.mlp.fc1", (inner, width))
        mappings += _linear(f"{native}.fc2", f"{layer}.mlp.fc2", (width, inner))
    if config.post_norm:
        mappings += _norm(f"{tower}.post_norm", f"{hf}.post_layernorm", width)
    return mappings


def is_unused(config: VisionConfig, name: str, prefix: str) -> bool:
    """Whether the features do not depend on a tensor: later blocks, final norm, pooling head."""
    hf = f"{prefix}vision_model."
    if not name.startswith(hf):
        return False
    rest = name.removeprefix(hf)
    if rest.startswith("encoder.layers."):
        return int(rest.split(".")[2]) >= num_blocks(config)
    return (
        rest.startswith("head.")
        or rest == "embeddings.position_ids"
        or (rest.startswith("post_layernorm.") and not config.post_norm)
    )


def _norm(native: str, hf: str, width: int) -> list[Mapping]:
    return [
        Replicated(f"{native}.weight", (f"{hf}.weight",), ((width,),), ones),
        Replicated(f"{native}.bias", (f"{hf}.bias",), ((width,),), zeros),
    ]


def _linear(native: str, hf: str, shape: Shape) -> list[Mapping]:
    return [
        Replicated(f"{native}.weight", (f"{hf}.weight",), (shape,), xavier_uniform),
        Replicated(f"{native}.bias", (f"{hf}.bias",), (shape[:1],), zeros),
    ]


def _stacked_linear(native: str, hf: list[str], width: int) -> list[Mapping]:
    return [
        Stacked(
            f"{native}.weight", tuple(f"{name}.weight" for name in hf), ((width, width),) * 3, xavier_uniform
        ),
        Stacked(f"{native}.bias", tuple(f"{name}.bias" for name in hf), ((width,),) * 3, zeros),
    ]


def write_siglip_config(config: VisionConfig, dtype: str) -> dict[str, Any]:
    """The tower's config.json: as many layers as are built, so the features are its last hidden state."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": num_blocks(config),
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "torch_dtype": dtype,
    }


def read_siglip_config(values: dict[str, Any], feature_layer: int, post_norm: bool) -> VisionConfig:
    """The tower a config.json describes."""
    if "siglip" not in str(values.get("model_type")):
        raise MegavilaError(
            f"vision tower of type {values.get('model_type')!r} is not supported; use a SigLIP tower"
        )
    return VisionConfig(
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        feature_layer=feature_layer,
        norm_eps=values.get("layer_norm_eps", 1e-6),
        post_norm=post_norm,
    )
