"""The roots: all that one GRPO run, one SFT run, one evaluation or one server is configured by."""

from dataclasses import dataclass, replace
from typing import Literal

from megavila.config.data import MAX_FRAMES, DataConfig
from megavila.config.model import ModelConfig, divisors
from megavila.config.parallel import ParallelConfig
from megavila.config.rollout import EngineConfig, RewardConfig, RolloutConfig
from megavila.config.run import RunSettings
from megavila.config.section import Section, knob, require, required, subsection
from megavila.config.training import CheckpointConfig, GrpoConfig, MrspConfig, OptimizerConfig, SftConfig


def check_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError unless the decoder's heads can be split over the parallel degrees.

    A model that comes from `model.path` is checked again when its config.json has been read.
    """
    language, tensor = model.language, parallel.tensor_parallel
    if language is None:
        return
    heads, kv_heads = language.num_heads, language.num_kv_heads
    shared = [d for d in divisors(heads) if kv_heads % d == 0 or d % kv_heads == 0]
    require(
        tensor in shared,
        f"{heads} query heads and {kv_heads} key/value heads cannot be split over parallel.tensor_parallel {tensor}; "
        f"use one of {shared}",
    )
    for name in ("hidden_size", "ffn_hidden_size"):
        size = getattr(language, name)
        require(
            size % tensor == 0,
            f"model.language.{name} {size} does not divide by parallel.tensor_parallel {tensor}; "
            f"use one of {[d for d in shared if size % d == 0]}",
        )
    local = heads // tensor
    require(
        local % parallel.ulysses == 0,
        f"{local} heads on each tensor-parallel rank cannot be split over Ulysses degree {parallel.ulysses}; "
        f"use parallel.cp_ulysses in {divisors(local)} or cp_comm_type p2p (ring)",
    )


def resolve_parallel(model: ModelConfig, parallel: ParallelConfig) -> ParallelConfig:
    """``parallel`` with the Ulysses degree that cp_comm_type auto takes for this model, checked against its heads.

    Of the degrees that divide the heads it is the one with which a rank sends least in a pass, and the lower one of equals:
    a ring sends while it computes.
    """
    if parallel.cp_comm_type == "auto" and parallel.cp_ulysses is None and model.language is not None:
        heads = model.language.num_heads // parallel.tensor_parallel
        kv_heads = max(1, model.language.num_kv_heads // parallel.tensor_parallel)

        def sent(ulysses: int) -> float:
            """In heads times this rank's tokens, one of q, k, v and the output."""
            held = max(kv_heads, ulysses)  # too few key and value heads are replicated
            exchanged = (2 * heads + 2 * held) * (ulysses - 1) / ulysses
            return exchanged + 2 * held * (parallel.context_parallel // ulysses - 1)

        allowed = [degree for degree in divisors(parallel.context_parallel) if heads % degree == 0]
        parallel = replace(parallel, cp_ulysses=min(allowed or [1], key=sent))
    check_split(model, parallel)
    return parallel


@dataclass(frozen=True, kw_only=True)
class TrainingRoot(Section):
    """The sections that every training run has."""

    run: RunSettings = required("The run itself.")
    model: ModelConfig = required("The model.")
    data: DataConfig = required("Rows, media and prompts.")
    parallel: ParallelConfig = subsection(ParallelConfig, "Parallel degrees.")
    optimizer: OptimizerConfig = subsection(OptimizerConfig, "Optimizer.")
    checkpoint: CheckpointConfig = subsection(CheckpointConfig, "Checkpoints.")
    mrsp: MrspConfig = subsection(MrspConfig, "Shared prefix and sequence parallelism.")

    def validate(self) -> None:
        check_split(self.model, self.parallel)
        require(bool(self.data.train), "data.train is empty; name at least one file of rows to train on")
        require(
            self.run.eval_every == 0 or bool(self.data.eval),
            f"run.eval_every is {self.run.eval_every} but data.eval is empty; name a file of rows or set eval_every 0",
        )
        require(
            self.optimizer.warmup_steps < self.total_updates,
            f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below the run's {self.total_updates} updates",
        )

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the whole run: the length of the learning-rate schedule."""
        return self.run.steps


@dataclass(frozen=True, kw_only=True)
class GrpoRunConfig(TrainingRoot):
    """Everything `pretrain_grpo.py` is configured by."""

    rollout: RolloutConfig = subsection(RolloutConfig, "Sampling of responses.")
    reward: RewardConfig = subsection(RewardConfig, "Scoring of responses.")
    grpo: GrpoConfig = subsection(GrpoConfig, "The algorithm.")

    def validate(self) -> None:
        super().validate()
        require(
            self.rollout.group_size >= 2,
            f"rollout.group_size is {self.rollout.group_size}; GRPO compares the responses of a group, use at least 2",
        )
        require(
            self.rollout.temperature > 0,
            "rollout.temperature is 0: greedy responses of a group are all equal and carry no gradient; "
            "use a temperature above 0, such as 1.0",
        )

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the whole run: steps x updates per pass x passes."""
        return self.run.steps * self.grpo.updates_per_batch * self.grpo.epochs_per_batch


@dataclass(frozen=True, kw_only=True)
class SftRunConfig(TrainingRoot):
    """Everything `pretrain_sft.py` is configured by."""

    sft: SftConfig = subsection(SftConfig, "The algorithm.")


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(EngineConfig):
    """A model that answers, and the engine that it answers with."""

    model: ModelConfig = required("The model.")
    data: DataConfig = required("Rows, media and prompts; the files are data.eval.")
    parallel: ParallelConfig = subsection(ParallelConfig, "Parallel degrees.")
    init_from: str | None = knob(None, "Checkpoint whose weights answer; null: those of model.path.")
    temperature: float = knob(0.0, "Softmax temperature; 0: greedy.")
    max_response_tokens: int = knob(1024, "Longest response, in tokens.")
    batch_size: int = knob(32, "Rows generated together.")
    store_gib: float = knob(1.0, "Memory for embeddings, in GiB.")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "auto: CUDA where there is a device, else the CPU.")
    seed: int = knob(0, "Seed of sampling, where the temperature is not 0.")

    def validate(self) -> None:
        super().validate()
        check_split(self.model, self.parallel)
        self.require_at_least(1, "max_response_tokens", "batch_size")
        self.require_at_least(0, "temperature", "seed", "store_gib")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(AnswerConfig):
    """One evaluation: a model, files of rows and the numbers of frames to score it at."""

    reward: RewardConfig = subsection(RewardConfig, "Scoring of responses.")
    num_frames: tuple[int, ...] = knob((), "Numbers of frames to evaluate at; empty: as data says.")
    blank_frames: bool = knob(False, "Show black frames instead of the video, to see what text alone gives.")
    limit: int | None = knob(None, "Evaluate the first so many rows only.")
    output: str | None = knob(None, "Directory for predictions and scores; null: print only.")

    def validate(self) -> None:
        super().validate()
        require(bool(self.data.eval), "data.eval is empty; name at least one file of rows")
        self.require_at_least(1, "limit")
        require(
            all(1 <= n <= MAX_FRAMES for n in self.num_frames),
            f"num_frames is {list(self.num_frames)}, each must be from 1 to {MAX_FRAMES}",
        )


@dataclass(frozen=True, kw_only=True)
class ServeConfig(AnswerConfig):
    """A model behind an HTTP endpoint. Requests without a temperature or max_tokens get those set here."""

    name: str | None = knob(None, "What requests call the model; null: model.path as it is given.")
    media_root: str | None = knob(None, "Directory whose videos requests may name; null: no videos.")
    host: str = knob("127.0.0.1", "Address to listen at; there is no authentication.")
    port: int = knob(8000, "Port to listen at; 0: a free one, which is logged.")
    max_waiting: int = knob(256, "Requests that may wait for a batch; more are turned away with status 503.")

    def validate(self) -> None:
        super().validate()
        self.require_at_least(1, "max_waiting")
        self.require_between(0, 65535, "port")
        require(
            self.name is not None or self.model.path is not None,
            "name is not set and there is no model.path to be called by; set name",
        )

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        return self.name if self.name is not None else str(self.model.path)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Section):
    """Log-probabilities of given responses: a model, files of rows that carry `responses`, and how they are laid out."""

    model: ModelConfig = required("The model.")
    data: DataConfig = required("Rows, media and prompts; the files are data.eval.")
    parallel: ParallelConfig = subsection(ParallelConfig, "Parallel degrees.")
    mrsp: MrspConfig = subsection(MrspConfig, "Shared prefix and sequence parallelism.")
    init_from: str | None = knob(None, "Checkpoint whose weights score; null: those of model.path.")
    temperature: float = knob(1.0, "Logits are divided by it, as they were when the responses were sampled.")
    max_tokens_per_microbatch: int = knob(262_144, "Most tokens that one forward pass holds.")
    batch_size: int = knob(32, "Rows whose videos are held together.")
    limit: int | None = knob(None, "Score the first so many rows only.")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "auto: CUDA where there is a device, else the CPU.")
    seed: int = knob(0, "Seed of the weights, where the model has none.")

    def validate(self) -> None:
        check_split(self.model, self.parallel)
        require(bool(self.data.eval), "data.eval is empty; name at least one file of rows")
        self.require_at_least(1, "max_tokens_per_microbatch", "batch_size", "limit")
        self.require_at_least(0, "seed")
        require(self.temperature > 0, f"temperature is {self.temperature}, must be greater than 0")
