"""The vision-language model: Megatron-core decoder, SigLIP tower, VILA projectors, weights in and out."""

from megavila.models.attention import AttentionContext, AttentionStrategy
from megavila.models.build import build_model, resolve_config
from megavila.models.convert import export_hf, load_hf, load_hf_directory, read_hf_config, save_hf
from megavila.models.language import LanguageModel
from megavila.models.logprobs import token_logprobs
from megavila.models.projector import Projector, num_media_rows, pool_frames, tokens_per_frame
from megavila.models.vision import SiglipVisionTower
from megavila.models.vlm import VisionLanguageModel

__all__ = [
    "AttentionContext",
    "AttentionStrategy",
    "LanguageModel",
    "Projector",
    "SiglipVisionTower",
    "VisionLanguageModel",
    "build_model",
    "export_hf",
    "load_hf",
    "load_hf_directory",
    "num_media_rows",
    "pool_frames",
    "read_hf_config",
    "resolve_config",
    "save_hf",
    "token_logprobs",
    "tokens_per_frame",
]
