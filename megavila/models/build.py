"""Builds a model from its configuration: random weights, or those of a checkpoint directory."""

from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn

from megavila.config import ModelConfig
from megavila.models.convert import load_hf_directory, read_hf_config
from megavila.models.families import get_family
from megavila.models.language import LanguageModel
from megavila.models.mapping import Row
from megavila.models.projector import Projector
from megavila.models.vision import SiglipVisionTower
from megavila.models.vlm import VisionLanguageModel
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import Platform
from megavila.runtime.seeds import derive_seed
from megavila.runtime.topology import Topology


def build_model(
    config: ModelConfig,
    topology: Topology,
    platform: Platform,
    *,
    seed: int = 0,
    max_frames_per_batch: int = 64,
) -> VisionLanguageModel:
    """The model on this rank, on the platform's device, parts that do not train frozen.

    With `config.path` the weights are read from that directory, and so is the architecture where
    `config.language` is None. Otherwise they are random: each checkpoint tensor is drawn whole from a
    generator seeded with `seed` and its name, so every tensor-parallel degree starts from the same model.
    """
    config = resolve_config(config)
    assert config.language is not None
    dtype = platform.default_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
    language = LanguageModel(
        config.language, topology, dtype=dtype, recompute=config.recompute, offload=config.offload_activations
    )
    vision = projector = None
    if config.vision is not None:
        vision = SiglipVisionTower(config.vision, dtype=dtype)
        projector = Projector(
            config.projector.kind, config.vision.hidden_size, config.language.hidden_size, dtype=dtype
        )
    model = VisionLanguageModel(
        config, language, vision, projector, max_frames_per_batch=max_frames_per_batch
    )
    _mark_sharded(model)
    if config.path is None:
        initialize_weights(model, seed)
    else:
        load_hf_directory(model, config.path)
    for part, trains in (
        (language, config.train_language),
        (vision, config.train_vision),
        (projector, config.train_projector),
    ):
        if part is not None:
            part.requires_grad_(trains)
    return model.to(platform.device)


def resolve_config(config: ModelConfig) -> ModelConfig:
    """`config` with the architecture filled in from `config.path` where it is not given."""
    if config.path is None:
        return config
    language, vision, projector = read_hf_config(Path(config.path), config.family)
    if config.language is not None:
        return config
    return replace(config, language=language, vision=config.vision or vision, projector=projector)


@torch.no_grad()
def initialize_weights(model: VisionLanguageModel, seed: int) -> None:
    """Draws all weights; the same for every tensor-parallel degree and on every device."""
    parameters = dict(model.named_parameters())
    topology = model.language.topology
    for mapping in get_family(model.config.family).mappings(model.config):
        tensors = []
        for name, shape in zip(mapping.hf, mapping.shapes, strict=True):
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            tensor = torch.empty(shape, dtype=torch.float32)
            mapping.init(tensor, generator)
            tensors.append(tensor)
        parameters.pop(mapping.native).copy_(mapping.shard(tensors, topology.tensor_rank, topology.tensor))
    if parameters:
        raise MegavilaError(
            f"model family {model.config.family!r} does not say how {sorted(parameters)[0]} is initialised "
            f"({len(parameters)} such parameters)"
        )


def _mark_sharded(model: nn.Module) -> None:
    """Sets the attributes of sharded parameters, which Megatron sets only where it initialises them."""
    assert isinstance(model, VisionLanguageModel)
    parameters = dict(model.named_parameters())
    for mapping in get_family(model.config.family).mappings(model.config):
        if mapping.is_sharded:
            parameter = parameters[mapping.native]
            if not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, 1 if isinstance(mapping, Row) else 0, 1)
