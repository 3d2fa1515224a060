"""Everything a trainer works with, built from its config in one place."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megavila.checkpoint.manager import CheckpointManager
from megavila.config import ModelConfig, TrainingRoot, resolve_parallel, save_config
from megavila.data.dataset import GroupSampler, PromptStream
from megavila.data.prompt import PromptBuilder
from megavila.data.row import Row
from megavila.data.rows import read_rows
from megavila.data.template import PromptTemplate
from megavila.data.tokenizer import Tokenizer, load_tokenizer
from megavila.media import FrameCache
from megavila.models import VisionLanguageModel, build_model, resolve_config, tokens_per_frame
from megavila.mrsp.encode import mark_partial_gradients
from megavila.runtime.errors import MegavilaError
from megavila.runtime.metrics import MetricsWriter
from megavila.runtime.platform import Platform, get_platform
from megavila.runtime.plugins import load_function
from megavila.runtime.seeds import derive_seed, seed_everything
from megavila.runtime.timers import Timers
from megavila.runtime.topology import Topology, opened
from megavila.training.augment import TransformedSampler
from megavila.training.gradients import GradientBuffer
from megavila.training.media import MediaEncoder
from megavila.training.optimizer import MasterAdamW
from megavila.training.state import TrainState, load_model_state
from megavila.training.throughput import ModelWork


@dataclass(frozen=True)
class Session:
    """The parts of one training run on this rank. ``state`` alone changes as the run goes on."""

    config: TrainingRoot
    platform: Platform
    topology: Topology
    directory: Path
    tokenizer: Tokenizer
    rows: Sequence[Row]
    skipped_rows: int
    model: VisionLanguageModel
    gradients: GradientBuffer
    optimizer: MasterAdamW
    prompts: PromptStream
    encoder: MediaEncoder
    work: ModelWork
    metrics: MetricsWriter
    timers: Timers
    checkpoints: CheckpointManager
    state: TrainState = field(default_factory=TrainState)


@contextmanager
def open_session(
    config: TrainingRoot, *, max_prompt_tokens: int, frames: FrameCache | None = None
) -> Iterator[Session]:
    """Join the processes, build all parts and yield them; leave the process groups at the end.

    Args:
        max_prompt_tokens: a longer prompt is an error that names the row, before anything is computed.
        frames: decoded frames to go on from, where several runs in one process read the same videos.
    """
    platform = get_platform(config.run.device)
    model_config = resolve_config(config.model)
    with opened(resolve_parallel(model_config, config.parallel), platform) as topology:
        yield _build(config, model_config, platform, topology, max_prompt_tokens, frames)


def _build(
    config: TrainingRoot,
    model_config: ModelConfig,
    platform: Platform,
    topology: Topology,
    max_prompt_tokens: int,
    frames: FrameCache | None,
) -> Session:
    seed_everything(config.run.seed, topology)
    # What may be wrong with the user's files comes first: a large model takes minutes to build.
    tokenizer = load_tokenizer(tokenizer_path(config.model))
    model_config = with_vocabulary(model_config, tokenizer)
    files = [read_rows(path, config.data) for path in config.data.train]
    rows = [row for file in files for row in file.rows]
    sampler = make_sampler(config, rows)
    builder = make_prompt_builder(config, model_config, tokenizer, max_prompt_tokens)
    model = build_model(
        model_config,
        topology,
        platform,
        seed=config.run.seed,
        max_frames_per_batch=config.mrsp.frames_per_batch,
    )
    if config.checkpoint.init_from is not None:
        load_initial_weights(model, Path(config.checkpoint.init_from), topology)
    if config.mrsp.encode == "sharded":
        mark_partial_gradients(model, topology)
    gradients = GradientBuffer(model.named_parameters(), topology)
    options = config.optimizer
    directory, timers = config.run.directory, Timers(platform)
    if topology.is_main:
        save_config(config, directory / "config.yaml")
    return Session(
        config=config,
        platform=platform,
        topology=topology,
        directory=directory,
        tokenizer=tokenizer,
        rows=rows,
        skipped_rows=sum(file.skipped for file in files),
        model=model,
        gradients=gradients,
        optimizer=MasterAdamW(
            gradients, weight_decay=options.weight_decay, betas=options.betas, eps=options.eps
        ),
        prompts=PromptStream(sampler, builder),
        encoder=MediaEncoder(config, model, topology, timers, frames),
        work=ModelWork(model),
        metrics=MetricsWriter(directory, topology),
        timers=timers,
        checkpoints=CheckpointManager(
            directory / "checkpoints", config.checkpoint.keep_last or sys.maxsize, topology
        ),
    )


def tokenizer_path(config: ModelConfig) -> Path:
    """Return where the tokenizer lies: `model.tokenizer`, or in the checkpoint (VILA: in its ``llm``)."""
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    if config.path is None:
        raise MegavilaError("model.tokenizer is not set; name a tokenizer directory or a sentencepiece model")
    inner = Path(config.path) / "llm"
    return inner if inner.is_dir() else Path(config.path)


def with_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return ``config`` with the tokenizer's vocabulary size where none is set.

    Raises:
        MegavilaError: the tokenizer has tokens that the model has no row for.
    """
    assert config.language is not None
    size = config.language.vocab_size
    if size is None:
        return replace(config, language=replace(config.language, vocab_size=tokenizer.vocab_size))
    if size < tokenizer.vocab_size:
        raise MegavilaError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.language.vocab_size is {size}; "
            "raise it to at least the first, or leave it out"
        )
    return config


def make_sampler(config: TrainingRoot, rows: Sequence[Row]) -> GroupSampler:
    """Return what draws the rows, changed by `data.transform` where one is named."""
    seed = derive_seed(config.run.seed, "rows")
    if config.data.transform is None:
        return GroupSampler(rows, seed)
    return TransformedSampler(rows, seed, load_function(config.data.transform))


def make_prompt_builder(
    config: TrainingRoot, model: ModelConfig, tokenizer: Tokenizer, max_prompt_tokens: int | None
) -> PromptBuilder:
    """Return the builder that fits the model: its tokens per frame, temporal pooling and longest sequence."""
    rows_per_frame = 1
    if model.vision is not None:
        rows_per_frame = tokens_per_frame(model.vision, model.projector)
    return PromptBuilder(
        tokenizer,
        PromptTemplate(config.data.template),
        config.data,
        rows_per_frame,
        temporal_pooling=model.projector.temporal_pooling,
        max_prompt_tokens=max_prompt_tokens,
    )


def load_initial_weights(model: VisionLanguageModel, path: Path, topology: Topology) -> None:
    """Copy the model weights of a checkpoint, and nothing else of it, into the model."""
    loaded = CheckpointManager(path.parent, 1, topology).load(path)
    assert loaded is not None  # only "auto" may find nothing
    load_model_state(model, loaded.model, str(path))
