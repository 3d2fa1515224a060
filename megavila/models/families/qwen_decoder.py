"""Parameter mappings and configuration of Qwen2, Qwen3 and Llama decoders under their Hugging Face names."""

from typing import Any

from megavila.config import LanguageConfig
from megavila.models.initializers import normal, ones, zeros
from megavila.models.mapping import GatedMlp, Mapping, Qkv, Replicated, Row, Vocab
from megavila.runtime.errors import MegavilaError


def decoder_mappings(config: LanguageConfig, prefix: str, init_std: float) -> list[Mapping]:
    """All parameters of the decoder; `prefix` stands before the checkpoint names, e.g. "llm."."""
    assert config.vocab_size is not None
    gpt, hidden = "language.gpt", config.hidden_size
    table = (config.vocab_size, hidden)
    vector = ((hidden,),)
    mappings: list[Mapping] = [
        Vocab(
            f"{gpt}.embedding.word_embeddings.weight",
            (f"{prefix}model.embed_tokens.weight",),
            (table,),
            normal(init_std),
        )
    ]
    for layer in range(config.num_layers):
        mappings += _layer_mappings(
            config, f"{gpt}.decoder.layers.{layer}", f"{prefix}model.layers.{layer}", init_std
        )
    mappings.append(
        Replicated(f"{gpt}.decoder.final_layernorm.weight", (f"{prefix}model.norm.weight",), vector, ones)
    )
    if not config.tie_word_embeddings:
        mappings.append(
            Vocab(f"{gpt}.output_layer.weight", (f"{prefix}lm_head.weight",), (table,), normal(init_std))
        )
    return mappings


def _layer_mappings(config: LanguageConfig, native: str, hf: str, init_std: float) -> list[Mapping]:
    hidden, inner, head = config.hidden_size, config.ffn_hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head, config.num_kv_heads * head
    attention, mlp = f"{native}.self_attention", f"{native}.mlp"
    # The residual stream adds two outputs a layer: their weights shrink so that its variance does not grow
    # with depth.
    into_residual = normal(init_std / (2 * config.num_layers) ** 0.5)
    q, k, v = (f"{hf}.self_attn.{name}_proj" for name in "qkv")

    def norm(native_name: str, hf_name: str, size: int) -> Mapping:
        return Replicated(f"{native_name}.weight", (f"{hf}.{hf_name}.weight",), ((size,),), ones)

    mappings: list[Mapping] = [
        norm(f"{native}.input_layernorm", "input_layernorm", hidden),
        Qkv(
            f"{attention}.linear_qkv.weight",
            (f"{q}.weight", f"{k}.weight", f"{v}.weight"),
            ((q_rows, hidden), (kv_rows, hidden), (kv_rows, hidden)),
            normal(init_std),
            config.num_kv_heads,
        ),
    ]
    if config.qkv_bias:
        mappings.append(
            Qkv(
                f"{attention}.linear_qkv.bias",
                (f"{q}.bias", f"{k}.bias", f"{v}.bias"),
                ((q_rows,), (kv_rows,), (kv_rows,)),
                zeros,
                config.num_kv_heads,
            )
        )
    if config.qk_norm:
        mappings.append(norm(f"{attention}.q_layernorm", "self_attn.q_norm", head))
        mappings.append(norm(f"{attention}.k_layernorm", "self_attn.k_norm", head))
    return mappings + [
        Row(
            f"{attention}.linear_proj.weight",
            (f"{hf}.self_attn.o_proj.weight",),
            ((hidden, q_rows),),
            into_residual,
        ),
        norm(f"{native}.pre_mlp_layernorm", "post_attention_layernorm", hidden),
        GatedMlp(
            f"{mlp}.linear_fc1.weight",
            (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
            ((inner, hidden), (inner, hidden)),
            normal(init_std),
        ),
        Row(f"{mlp}.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), ((hidden, inner),), into_residual),
    ]


_ARCHITECTURES = {
    # (qkv_bias, qk_norm) -> (model_type, class)
    (True, False): ("qwen2", "Qwen2ForCausalLM"),
    (False, True): ("qwen3", "Qwen3ForCausalLM"),
    (False, False): ("llama", "LlamaForCausalLM"),
}


def write_decoder_config(config: LanguageConfig, dtype: str) -> dict[str, Any]:
    """The decoder's config.json."""
    kind = _ARCHITECTURES.get((config.qkv_bias, config.qk_norm))
    if kind is None:
        raise MegavilaError(
            "no Hugging Face architecture has both qkv_bias and qk_norm; export needs one of them "
            "(Qwen2, Qwen3) or neither"
        )
    model_type, architecture = kind
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def read_decoder_config(values: dict[str, Any]) -> LanguageConfig:
    """The decoder a config.json describes."""
    model_type = values.get("model_type")
    known = {name: flags for flags, (name, _) in _ARCHITECTURES.items()}
    if model_type not in known:
        raise MegavilaError(f"decoder of type {model_type!r} is not supported; use one of {sorted(known)}")
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default" or values.get(
        "use_sliding_window"
    ):
        raise MegavilaError("decoders with scaled rotary embeddings or sliding windows are not supported")
    qkv_bias, qk_norm = known[model_type]
    heads = values["num_attention_heads"]
    return LanguageConfig(
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        ffn_hidden_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        max_position_embeddings=values.get("max_position_embeddings", 32768),
        rope_theta=values.get("rope_theta") or scaling.get("rope_theta") or 10_000.0,
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
