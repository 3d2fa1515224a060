"""A trained model with its tokenizer, on the ranks that were started: what answering and scoring begin with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megavila.config import AnswerConfig, ScoreConfig, resolve_parallel
from megavila.data import Tokenizer, load_tokenizer
from megavila.models import VisionLanguageModel, build_model, resolve_config
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import seed_everything
from megavila.runtime.topology import Topology, opened
from megavila.training.session import load_initial_weights, tokenizer_path, with_vocabulary


@dataclass(frozen=True)
class LoadedModel:
    """What `open_model` yields."""

    topology: Topology
    tokenizer: Tokenizer
    model: VisionLanguageModel


@contextmanager
def open_model(config: AnswerConfig | ScoreConfig) -> Iterator[LoadedModel]:
    """Join the processes, load the weights of `model.path` or `init_from`; leave the process groups at the end."""
    platform = get_platform(config.device)
    model_config = resolve_config(config.model)
    with opened(resolve_parallel(model_config, config.parallel), platform) as topology:
        seed_everything(config.seed, topology)
        tokenizer = load_tokenizer(tokenizer_path(config.model))
        model_config = with_vocabulary(model_config, tokenizer)
        model = build_model(model_config, topology, platform, seed=config.seed)
        if config.init_from is not None:
            load_initial_weights(model, Path(config.init_from), topology)
        yield LoadedModel(topology, tokenizer, model)
