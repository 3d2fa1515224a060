"""Every knob: frozen dataclasses, read from YAML and `key=value` overrides and validated where built."""

from megavila.config.data import DataConfig
from megavila.config.describe import Knob, describe, describe_text
from megavila.config.load import build, load_config, save_config, to_dict
from megavila.config.model import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megavila.config.parallel import ParallelConfig
from megavila.config.recipes import (
    AnswerConfig,
    EvalConfig,
    GrpoRunConfig,
    ScoreConfig,
    ServeConfig,
    SftRunConfig,
    TrainingRoot,
    check_split,
    resolve_parallel,
)
from megavila.config.rollout import EngineConfig, RewardConfig, RolloutConfig
from megavila.config.run import RunSettings
from megavila.config.section import ConfigError
from megavila.config.training import CheckpointConfig, GrpoConfig, MrspConfig, OptimizerConfig, SftConfig

__all__ = [
    "AnswerConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "GrpoConfig",
    "GrpoRunConfig",
    "Knob",
    "LanguageConfig",
    "ModelConfig",
    "MrspConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProjectorConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunSettings",
    "ScoreConfig",
    "ServeConfig",
    "SftConfig",
    "SftRunConfig",
    "TrainingRoot",
    "VisionConfig",
    "build",
    "check_split",
    "resolve_parallel",
    "describe",
    "describe_text",
    "load_config",
    "save_config",
    "to_dict",
]
