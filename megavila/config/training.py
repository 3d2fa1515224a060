"""What is optimised, and how: GRPO, SFT, optimizer, checkpoints and MR-SP."""

from dataclasses import dataclass
from typing import Literal

from megavila.config.section import Section, knob, require


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(Section):
    """Group relative policy optimisation (paper, equations 1 and 2)."""

    prompts_per_step: int = knob(16, "Prompts of one rollout batch, over all data-parallel ranks.")
    updates_per_batch: int = knob(
        1, "Optimizer updates in one pass over a rollout batch; its groups are split among them."
    )
    epochs_per_batch: int = knob(1, "Passes over each rollout batch.")
    clip_low: float = knob(0.2, "The probability ratio is clipped from below at 1 - clip_low.")
    clip_high: float = knob(0.2, "The probability ratio is clipped from above at 1 + clip_high.")
    kl_beta: float = knob(
        0.0, "Weight of the KL divergence to the reference model; 0: no reference model is kept."
    )
    kl_estimator: Literal["k1", "k2", "k3"] = knob(
        "k3", "Estimator of the KL: k1 (difference), k2 (half its square), k3 (unbiased and non-negative)."
    )
    advantage_std: bool = knob(True, "Divide advantages by the group's standard deviation (equation 2).")
    drop_zero_variance: bool = knob(
        True, "Leave out groups whose rewards are all equal: they carry no gradient."
    )
    loss_aggregation: Literal["sequence_mean", "token_mean"] = knob(
        "sequence_mean",
        "Mean over each response's tokens and then over responses (equation 1), or over all tokens.",
    )
    max_tokens_per_microbatch: int = knob(16_384, "Most tokens of one forward pass on a model replica.")

    def validate(self) -> None:
        self.require_at_least(
            1, "prompts_per_step", "updates_per_batch", "epochs_per_batch", "max_tokens_per_microbatch"
        )
        self.require_between(0, 1, "clip_low")
        self.require_at_least(0, "clip_high", "kl_beta")
        require(
            self.updates_per_batch <= self.prompts_per_step,
            f"updates_per_batch {self.updates_per_batch} exceeds prompts_per_step {self.prompts_per_step}: an update "
            "needs at least one group; use epochs_per_batch for more updates",
        )


@dataclass(frozen=True, kw_only=True)
class SftConfig(Section):
    """Supervised fine-tuning on chains of thought."""

    batch_size: int = knob(32, "Rows of one optimizer step, over all data-parallel ranks.")
    max_tokens_per_microbatch: int = knob(16_384, "Most tokens of one forward pass on a model replica.")
    think_fraction: float = knob(
        1.0, "Fraction of rows trained with their reasoning; the others answer at once."
    )
    reasoning: str | None = knob(
        None,
        "module:function(row, timestamps) -> the reasoning that the frames shown support, or None to leave the row out; "
        "null: the row's own reasoning.",
    )

    def validate(self) -> None:
        self.require_at_least(1, "batch_size", "max_tokens_per_microbatch")
        self.require_between(0, 1, "think_fraction")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW with fp32 masters and a learning-rate schedule."""

    lr: float = knob(1e-6, "Peak learning rate.")
    min_lr: float = knob(0.0, "Learning rate at the end of a linear or cosine schedule.")
    warmup_steps: int = knob(0, "Updates over which the learning rate rises linearly from 0 to lr.")
    schedule: Literal["constant", "linear", "cosine"] = knob(
        "constant", "How the learning rate falls after warm-up."
    )
    weight_decay: float = knob(0.0, "Decoupled weight decay of matrices; biases and norms are never decayed.")
    betas: tuple[float, float] = knob((0.9, 0.999), "Decay rates of Adam's moments.")
    eps: float = knob(1e-8, "Adam's epsilon.")
    clip_grad: float = knob(1.0, "Largest global gradient norm; 0: no clipping.")
    moments_dtype: Literal["float32"] = knob("float32", "Type of Adam's moments.")

    def validate(self) -> None:
        self.require_positive("lr", "eps")
        self.require_at_least(0, "min_lr", "warmup_steps", "weight_decay", "clip_grad")
        require(self.min_lr <= self.lr, f"min_lr {self.min_lr} is above lr {self.lr}")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas are {list(self.betas)}, must be at least 0 and below 1",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = knob(100, "Write a checkpoint every so many steps; 0: only at the end.")
    keep_last: int = knob(2, "Checkpoints of the run that are kept; 0: all.")
    save_final: bool = knob(True, "Write a checkpoint after the last step.")
    init_from: str | None = knob(
        None,
        "Checkpoint whose model weights (nothing else of it) a new run starts from, such as an SFT run's.",
    )

    def validate(self) -> None:
        self.require_at_least(0, "every", "keep_last")


@dataclass(frozen=True, kw_only=True)
class MrspConfig(Section):
    """Multi-modal reinforcement sequence parallelism (paper, section 5)."""

    layout: Literal["shared_prefix", "repeated"] = knob(
        "shared_prefix",
        "One prompt followed by its G responses, or the prompt repeated for each (the baseline).",
    )
    encode: Literal["sharded", "replicated"] = knob(
        "sharded",
        "Frames are split over the ranks of a replica (tensor x context), or every rank decodes and encodes all of "
        "them (the baseline).",
    )
    frames_per_batch: int = knob(
        64, "Frames in the vision tower at one time on each rank, which bounds the memory of its activations."
    )
    reuse: Literal["step", "rollout", "none"] = knob(
        "step",
        "What encoded videos are shared by: all passes of a step, and later steps while there is room; the rollout's "
        "prompts and responses only; one prompt's responses only (the baseline).",
    )
    store_gib: float = knob(4.0, "Memory for encoded videos on each rank, in GiB.")
    store_dtype: Literal["auto", "bfloat16"] = knob(
        "auto", "What encoded videos are kept in, and rounded to; auto: the model's own type."
    )
    store_dir: str | None = knob(
        None,
        "Directory where encoded videos are kept for later epochs and runs with the same vision tower; not used "
        "while the tower trains. null: none.",
    )

    def validate(self) -> None:
        self.require_at_least(0, "store_gib")
        self.require_at_least(1, "frames_per_batch")
        require(
            self.store_dir is None or self.reuse == "step",
            f"store_dir is {self.store_dir}, but reuse is {self.reuse}: nothing would be kept in it; set reuse to step",
        )
