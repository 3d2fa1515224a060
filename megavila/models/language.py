"""The decoder: Megatron-core's GPTModel on one packed run of tokens."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn
from torch.autograd.graph import save_on_cpu

from megavila.config import LanguageConfig
from megavila.models.attention import AttentionContext, PackedAttention, RotatedContext
from megavila.models.layer import DecoderLayer
from megavila.models.linear import ColumnParallelLinear, RowParallelLinear
from megavila.models.norm import HeadRMSNorm, RMSNorm
from megavila.models.rotary import RotaryEmbedding
from megavila.models.swiglu import SwiGlu
from megavila.runtime.errors import MegavilaError
from megavila.runtime.topology import Topology


class LanguageModel(nn.Module):
    """Qwen2/Qwen3-type decoder with tensor and sequence parallelism.

    Every rank of a tensor-parallel group passes the same tokens and receives all rows of the result. What
    flows back into that result may differ between the ranks: gradients are summed over the group, so a loss
    that every rank computes in full must not be differentiated through it on more than one rank
    (`token_logprobs` keeps to this).

    Args:
        config: sizes.
        topology: supplies the tensor-parallel group.
        dtype: of the parameters.
        offload: the layers' inputs that recomputation starts from wait in host memory.
        recompute: "none", or "full": keep only each layer's input and run the layer again in the backward
            pass; "keep_attention": the same here, and the attention strategy keeps its results.
    """

    def __init__(
        self,
        config: LanguageConfig,
        topology: Topology,
        *,
        dtype: torch.dtype,
        recompute: str = "none",
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.offload = offload
        self.topology = topology
        self.vocab_size = _vocab_size(config, topology.tensor)
        _check_divisible(config, topology.tensor)
        padded_vocab_size = -(-self.vocab_size // topology.tensor) * topology.tensor
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.mrope_section)
        self.gpt = GPTModel(
            config=_transformer_config(config, topology, dtype, recompute),
            transformer_layer_spec=_block_submodules(config),  # type: ignore[arg-type]
            vocab_size=padded_vocab_size,
            max_sequence_length=config.max_position_embeddings,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            share_embeddings_and_output_weights=config.tie_word_embeddings,
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (t,) -> (t, hidden)."""
        return self.gpt.embedding.word_embeddings(token_ids)

    def forward(self, embeddings: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """embeddings (t, hidden), any t > 0 -> hidden states (t, hidden) after the final norm."""
        tokens, group = embeddings.shape[0], self.topology.tensor_group
        if context.num_tokens != tokens:
            raise MegavilaError(
                f"{tokens} embedding rows but {context.num_tokens} position ids; give one id per row"
            )
        rotated = RotatedContext(context, self.rotary(context.position_ids))
        if self.topology.sequence_parallel:
            embeddings = F.pad(embeddings, (0, 0, 0, -tokens % self.topology.tensor))
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=group)
        with save_on_cpu(pin_memory=embeddings.is_cuda) if self.offload else nullcontext():
            hidden = self.gpt.decoder(
                hidden_states=embeddings.unsqueeze(1), attention_mask=None, packed_seq_params=rotated
            ).squeeze(1)
        # Both sum the ranks' gradients on the way back.
        if self.topology.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )[:tokens]
        return copy_to_tensor_model_parallel_region(hidden, group=group)

    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output embedding, (vocab / TP, hidden), without padding.

        Padding rows make the vocabulary divisible and lie at its end, so the last rank may have fewer rows.
        """
        tied = self.config.tie_word_embeddings
        weight = self.gpt.embedding.word_embeddings.weight if tied else self.gpt.output_layer.weight
        assert weight is not None
        valid = self.vocab_size - self.topology.tensor_rank * weight.shape[0]
        return weight if valid >= weight.shape[0] else weight[:valid]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (n, hidden) -> fp32 logits (n, vocab) on every rank, for sampling; not differentiable."""
        logits = F.linear(hidden, self.output_weight()).float()
        tensor = self.topology.tensor
        if tensor == 1:
            return logits
        per_rank = -(-self.vocab_size // tensor)
        logits = F.pad(logits, (0, per_rank - logits.shape[1]))
        parts = [torch.empty_like(logits) for _ in range(tensor)]
        torch.distributed.all_gather(parts, logits, group=self.topology.tensor_group)
        return torch.cat(parts, dim=1)[:, : self.vocab_size]


def _vocab_size(config: LanguageConfig, tensor: int) -> int:
    if config.vocab_size is None:
        raise MegavilaError(
            "language.vocab_size is not set; set it or fill it in from the tokenizer before building"
        )
    if config.vocab_size <= (tensor - 1) * -(-config.vocab_size // tensor):
        raise MegavilaError(
            f"language.vocab_size={config.vocab_size} is too small to be split over "
            f"tensor_parallel={tensor}: the last rank would hold no token; use a smaller degree"
        )
    return config.vocab_size


def _check_divisible(config: LanguageConfig, tensor: int) -> None:
    for name in ("num_heads", "ffn_hidden_size"):
        value = getattr(config, name)
        if value % tensor:
            fits = [degree for degree in range(1, tensor + 1) if value % degree == 0]
            raise MegavilaError(
                f"language.{name}={value} cannot be split over tensor_parallel={tensor}; use one of {fits}"
            )
    larger, smaller = max(config.num_kv_heads, tensor), min(config.num_kv_heads, tensor)
    if larger % smaller or (config.num_heads + 2 * config.num_kv_heads) * config.head_dim % tensor:
        raise MegavilaError(
            f"language.num_kv_heads={config.num_kv_heads} cannot be spread over tensor_parallel={tensor}; "
            "use a degree that divides num_kv_heads, or a multiple of it"
        )


def _transformer_config(
    config: LanguageConfig, topology: Topology, dtype: torch.dtype, recompute: str
) -> TransformerConfig:
    again = recompute != "none"
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=config.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tensor,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # Our initialisation does not depend on the tensor-parallel degree (build.py), so Megatron's is not
        # wanted.
        use_cpu_initialization=True,
        perform_initialization=False,
        # In spite of its name: take the MLP's activation from the layer's submodules.
        use_te_activation_func=True,
        # These go through torch.compile on first use, and again for each new token count.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        recompute_granularity="full" if again else None,
        recompute_method="uniform" if again else None,
        recompute_num_layers=1 if again else None,
    )


def _block_submodules(config: LanguageConfig) -> TransformerBlockSubmodules:
    qk_norm = {"q_layernorm": HeadRMSNorm, "k_layernorm": HeadRMSNorm} if config.qk_norm else {}
    layer = ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,  # type: ignore[arg-type]
                    core_attention=PackedAttention,  # type: ignore[arg-type]
                    linear_proj=RowParallelLinear,
                    **qk_norm,
                ),
            ),
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGlu
                ),
            ),
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.num_layers,
        layer_norm=RMSNorm,  # type: ignore[arg-type]
    )
