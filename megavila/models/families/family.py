"""What a model family must say about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megavila.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavila.models.mapping import Mapping


@dataclass(frozen=True)
class Family:
    """One family's weights and checkpoint layout.

    name: `model.family`.
    parts: folder of a checkpoint directory -> prefix of its tensors' names.
    mappings: every parameter of the model, once.
    is_unused: whether a checkpoint tensor of this name is known and has no place in the model.
    constants: tensors that the format's loaders expect though the features do not depend on them; written,
        never read.
    canonical_name: the name in the table for the name a checkpoint uses.
    read_config: checkpoint directory -> architecture.
    write_config: model -> {path in the checkpoint directory: JSON object}.
    """

    name: str
    parts: dict[str, str]
    mappings: Callable[[ModelConfig], list[Mapping]]
    is_unused: Callable[[ModelConfig, str], bool]
    constants: Callable[[ModelConfig], dict[str, torch.Tensor]]
    canonical_name: Callable[[str], str]
    read_config: Callable[[Path], tuple[LanguageConfig, VisionConfig | None, ProjectorConfig]]
    write_config: Callable[[ModelConfig, str], dict[str, dict[str, Any]]]
