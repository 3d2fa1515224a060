"""transformers models with random weights, and how ours are compared with them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megavila.config import LanguageConfig, ModelConfig, ParallelConfig, VisionConfig
from megavila.models import AttentionContext, VisionLanguageModel, build_model, load_hf
from megavila.models.families import get_family
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import seed_everything
from megavila.runtime.topology import Topology, initialize


@dataclass(frozen=True)
class LanguageCase:
    """A decoder and a token count. 203 tokens of vocabulary: odd, so that TP 2 pads it."""

    family: str = "qwen2"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    tied: bool = False
    tokens: int = 37
    recompute: str = "none"

    def config(self) -> LanguageConfig:
        return LanguageConfig(
            hidden_size=64,
            num_layers=3,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            ffn_hidden_size=96,
            vocab_size=203,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            tie_word_embeddings=self.tied,
            qkv_bias=self.family == "qwen2",
            qk_norm=self.family == "qwen3",
        )


CASES = [
    LanguageCase(),
    LanguageCase(family="qwen3"),
    LanguageCase(tied=True, tokens=64),
    LanguageCase(num_kv_heads=4, tokens=1),
    LanguageCase(num_kv_heads=1, recompute="full", tokens=33),
    LanguageCase(family="qwen3", num_kv_heads=1, head_dim=32, recompute="full", tokens=5),
]


def start(tensor: int = 1) -> Topology:
    """Initialises the topology of this process's world."""
    topology = initialize(ParallelConfig(tensor_parallel=tensor), get_platform("cpu"))
    seed_everything(0, topology)
    return topology


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Makes every weight, bias and norm matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(
                0.1 * noise + (1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0)
            )


def check_errors(errors: dict[str, float]) -> None:
    """Requires agreement with transformers within fp32 rounding."""
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, (worst, errors[worst])
    assert len(errors) > 20


def hf_decoder(case: LanguageCase) -> Any:
    c = case.config()
    values: dict[str, Any] = dict(
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.ffn_hidden_size,
        vocab_size=c.vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="eager",
    )
    if case.family == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**values))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**values))
    randomize(model, 1)
    return model


def hf_tower(config: VisionConfig) -> Any:
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.norm_eps,
        )
    )
    randomize(model, 2)
    return model


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain causal attention of one sequence: torch's own kernel."""
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def our_decoder(case: LanguageCase, topology: Topology, hf: Any) -> VisionLanguageModel:
    recompute: Any = case.recompute
    config = ModelConfig(language=case.config(), dtype="float32", recompute=recompute)
    model = build_model(config, topology, get_platform("cpu"))
    load_hf(model, {f"llm.{name}": tensor for name, tensor in hf.state_dict().items()})
    return model


def hf_gradients(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Full gradients under checkpoint names, reduced as training reduces them."""
    topology = model.language.topology
    parameters = dict(model.named_parameters())
    gradients: dict[str, Tensor] = {}
    for mapping in get_family(model.config.family).mappings(model.config):
        parameter = parameters[mapping.native]
        assert parameter.grad is not None, mapping.native
        gradient = parameter.grad.clone()
        if topology.context > 1:
            dist.all_reduce(gradient, group=topology.context_group)
        if topology.tensor > 1 and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=topology.tensor_group)
        shards = [gradient]
        if mapping.is_sharded and topology.tensor > 1:
            shards = [torch.empty_like(gradient) for _ in range(topology.tensor)]
            dist.all_gather(shards, gradient.contiguous(), group=topology.tensor_group)
        gradients |= zip(mapping.hf, mapping.unshard(shards), strict=True)
    return gradients


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    scale = theirs.norm()  # exactly zero for q and k of a single token, whose softmax is 1 whatever they are
    return float((ours - theirs).norm() / (scale if scale > 0 else 1.0))


def decoder_errors(case: LanguageCase, topology: Topology) -> dict[str, float]:
    """Relative errors of hidden states, logits, log-probs and every gradient against transformers."""
    hf = hf_decoder(case)
    model = our_decoder(case, topology, hf)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 203, (case.tokens,), generator=generator)
    targets = torch.randint(0, 203, (case.tokens,), generator=generator)
    upstream = torch.randn(case.tokens, generator=generator)

    reference = hf(ids[None], output_hidden_states=True)
    hf_logits = reference.logits[0]
    hf_logprobs = torch.log_softmax(hf_logits, -1).gather(1, targets[:, None]).squeeze(1)
    (upstream * hf_logprobs).sum().backward()

    embeddings = model.embed(ids, torch.full_like(ids, -1), None)
    hidden = model(embeddings, AttentionContext(torch.arange(case.tokens), causal))
    logprobs, _ = model.token_logprobs(hidden, targets, chunk=16)
    (upstream * logprobs).sum().backward()

    errors = {
        "hidden": relative_error(hidden.detach(), reference.hidden_states[-1][0].detach()),
        "logits": relative_error(model.language.logits(hidden), hf_logits.detach()),
        "logprobs": relative_error(logprobs.detach(), hf_logprobs.detach()),
    }
    ours = hf_gradients(model)
    theirs = {f"llm.{name}": parameter.grad for name, parameter in hf.named_parameters()}
    assert ours.keys() == theirs.keys()
    return errors | {name: relative_error(ours[name], theirs[name]) for name in theirs}
