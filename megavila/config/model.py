"""Architecture of the vision-language model and which of its parts train."""

from dataclasses import dataclass
from typing import Literal

from megavila.config.section import Section, knob, require, required, subsection


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(Section):
    """A Qwen2/Qwen3-type decoder; the defaults are Qwen2's conventions."""

    hidden_size: int = required("Width of the residual stream.")
    num_layers: int = required("Number of decoder layers.")
    num_heads: int = required("Query heads.")
    num_kv_heads: int = knob(0, "Key/value heads (grouped-query attention); 0: as many as num_heads.")
    head_dim: int = knob(0, "Width of one head; 0: hidden_size / num_heads.")
    ffn_hidden_size: int = required("Inner width of the gated MLP.")
    vocab_size: int | None = knob(None, "Rows of the embedding; null: the tokenizer's vocabulary size.")
    max_position_embeddings: int = knob(32768, "Longest position the model is meant for, in tokens.")
    rope_theta: float = knob(1_000_000.0, "Base of the rotary frequencies.")
    norm_eps: float = knob(1e-6, "Epsilon of RMSNorm.")
    tie_word_embeddings: bool = knob(False, "Share the input embedding with the output layer.")
    qkv_bias: bool = knob(True, "Bias on the query, key and value projections (Qwen2: true, Qwen3: false).")
    qk_norm: bool = knob(False, "RMSNorm on queries and keys of each head (Qwen3: true).")
    mrope_section: tuple[int, ...] | None = knob(
        None, "Frequencies given to time, height and width in 3-D rotary embeddings; null: 1-D positions."
    )

    def validate(self) -> None:
        self.require_at_least(
            1,
            "hidden_size",
            "num_layers",
            "num_heads",
            "ffn_hidden_size",
            "vocab_size",
            "max_position_embeddings",
        )
        self.require_at_least(0, "num_kv_heads", "head_dim")
        self.require_positive("rope_theta", "norm_eps")
        if self.num_kv_heads == 0:
            self.resolve("num_kv_heads", self.num_heads)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.num_heads} query heads cannot be shared by {self.num_kv_heads} key/value heads; "
            f"use num_kv_heads in {divisors(self.num_heads)}",
        )
        if self.head_dim == 0:
            require(
                self.hidden_size % self.num_heads == 0,
                f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}; set head_dim",
            )
            self.resolve("head_dim", self.hidden_size // self.num_heads)
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, must be even for rotary embeddings")
        if self.mrope_section is not None:
            require(
                len(self.mrope_section) == 3 and sum(self.mrope_section) == self.head_dim // 2,
                f"mrope_section is {list(self.mrope_section)}, must be three numbers with the sum "
                f"head_dim / 2 = {self.head_dim // 2}",
            )


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Section):
    """A SigLIP-type vision tower."""

    hidden_size: int = required("Width of the tower.")
    num_layers: int = required("Number of encoder layers.")
    num_heads: int = required("Attention heads.")
    intermediate_size: int = required("Inner width of the MLP.")
    image_size: int = required("Height and width of a frame, in pixels.")
    patch_size: int = required("Height and width of a patch, in pixels.")
    feature_layer: int = knob(
        -2,
        "Hidden state handed to the projector, as VILA's mm_vision_select_layer: -1 is the last layer's output.",
    )
    norm_eps: float = knob(1e-6, "Epsilon of LayerNorm.")
    post_norm: bool = knob(
        False, "Apply the tower's final LayerNorm to the features (only with feature_layer -1)."
    )

    def validate(self) -> None:
        self.require_at_least(
            1, "hidden_size", "num_layers", "num_heads", "intermediate_size", "image_size", "patch_size"
        )
        self.require_positive("norm_eps")
        require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}; "
            f"use num_heads in {divisors(self.hidden_size)}",
        )
        require(
            self.patch_size <= self.image_size,
            f"patch_size {self.patch_size} is larger than image_size {self.image_size}",
        )
        lowest = -self.num_layers - 1  # the patch embedding itself
        require(
            lowest <= self.feature_layer <= -1,
            f"feature_layer is {self.feature_layer}, must be from {lowest} to -1 for {self.num_layers} layers",
        )
        require(
            not self.post_norm or self.feature_layer == -1,
            f"post_norm needs feature_layer -1, not {self.feature_layer}: the final LayerNorm follows the last layer",
        )

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a frame; a remainder of image_size / patch_size is not looked at."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Section):
    """From vision features to rows of the language model's embedding space."""

    kind: Literal[
        "linear", "mlp2x_gelu", "mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"
    ] = knob("mlp_downsample_2x2_fix", "VILA's projector types.")
    temporal_pooling: int = knob(1, "Mean over the projected rows of so many consecutive frames.")

    def validate(self) -> None:
        self.require_at_least(1, "temporal_pooling")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The vision-language model: from a checkpoint directory, or described here and initialised randomly."""

    path: str | None = knob(None, "Directory of a VILA or Hugging Face checkpoint to start from.")
    family: str = knob("vila", "Model family: names of weights, order of media tokens, positions.")
    language: LanguageConfig | None = knob(None, "The decoder; null: as config.json under path says.")
    vision: VisionConfig | None = knob(
        None, "The vision tower; null: as config.json under path says, or none."
    )
    projector: ProjectorConfig = subsection(ProjectorConfig, "Between tower and decoder.")
    tokenizer: str | None = knob(
        None, "Tokenizer directory or sentencepiece model; null: the one under path."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = knob(
        "auto", "Type of weights and activations; auto: bfloat16 on CUDA, float32 on a CPU."
    )
    init_std: float = knob(0.02, "Standard deviation of randomly initialised weights.")
    train_vision: bool = knob(False, "Train the vision tower.")
    train_projector: bool = knob(True, "Train the projector.")
    train_language: bool = knob(True, "Train the decoder.")
    recompute: Literal["none", "full", "keep_attention"] = knob(
        "none",
        "full: recompute each decoder layer in the backward pass; keep_attention: all of it but attention, whose output "
        "is kept (tokens x hidden size more a layer, and no attention done twice).",
    )
    offload_activations: bool = knob(
        False,
        "With recompute full: keep each layer's input in host memory until the backward pass, for prompts so long that "
        "tokens x hidden size x layers do not fit on the GPU.",
    )
    attention_backend: Literal["auto", "torch", "triton", "reference"] = knob(
        "auto", "Implementation of interval attention; auto: the best one for the device."
    )

    def validate(self) -> None:
        self.require_positive("init_std")
        require(
            self.recompute != "keep_attention" or self.attention_backend != "reference",
            "recompute keep_attention needs an attention_backend that can go on from kept results; use auto, or "
            "recompute full",
        )
        require(
            not self.offload_activations or self.recompute == "full",
            f"offload_activations needs recompute full, not {self.recompute}: it moves the inputs of the layers that are "
            "recomputed",
        )
        require(
            self.path is not None or self.language is not None,
            "neither path nor language is set; name a checkpoint directory in path or describe the decoder",
        )
        require(
            self.train_vision or self.train_projector or self.train_language,
            "train_vision, train_projector and train_language are all false: nothing would train",
        )


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending: the allowed values in error messages."""
    return [d for d in range(1, number + 1) if number % d == 0]
