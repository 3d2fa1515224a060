"""What two tensor-parallel ranks compute, in one pair of processes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavila.config import LanguageConfig, ModelConfig, VisionConfig
from megavila.models import (
    AttentionContext,
    VisionLanguageModel,
    build_model,
    export_hf,
    load_hf_directory,
    save_hf,
    token_logprobs,
)
from megavila.runtime.errors import MegavilaError
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import Topology
from tests.models.hf_reference import CASES, causal, decoder_errors, hf_gradients, start


@dataclass(frozen=True)
class LogprobInputs:
    hidden: Tensor  # (23, 16)
    weight: Tensor  # (51, 16): an odd vocabulary, so the second of two ranks has one row less
    targets: Tensor
    upstream: Tensor  # (2, 23): of log-probabilities and entropies


def logprob_inputs() -> LogprobInputs:
    g = torch.Generator().manual_seed(7)
    return LogprobInputs(
        hidden=torch.randn(23, 16, generator=g, dtype=torch.float64),
        weight=torch.randn(51, 16, generator=g, dtype=torch.float64),
        targets=torch.randint(0, 51, (23,), generator=g),
        upstream=torch.randn(2, 23, generator=g),
    )


def logprob_reference(inputs: LogprobInputs, temperature: float) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies and the gradients of hidden and weight in fp64, from the full softmax."""
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    full = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    logprobs = full.gather(1, inputs.targets[:, None]).squeeze(1)
    entropy = -(full.exp() * full).sum(-1)
    ((logprobs * inputs.upstream[0]).sum() + (entropy * inputs.upstream[1]).sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def vlm_config(**changes: Any) -> ModelConfig:
    """A small model: qk norm, odd vocabulary, odd patch grid, a tower layer that is not built."""
    language = LanguageConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=48,
        vocab_size=61,
        qk_norm=True,
        qkv_bias=False,
    )
    vision = VisionConfig(
        hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24, image_size=21, patch_size=7
    )
    return ModelConfig(**{"language": language, "vision": vision, "train_vision": True, **changes})


def vlm_step(model: VisionLanguageModel, tokens: int = 21) -> dict[str, Tensor]:
    """Log-probabilities of a prompt with two frames, sampling logits, and all gradients."""
    g = torch.Generator().manual_seed(11)
    frames = torch.randint(0, 256, (2, 3, 21, 21), dtype=torch.uint8, generator=g)
    ids = torch.randint(0, 61, (tokens,), generator=g)
    media_index = torch.full((tokens,), -1)
    media_index[3:7], media_index[9:13] = torch.arange(4), torch.arange(4, 8)
    rows = model.media_rows(model.encode_frames(frames))
    hidden = model(model.embed(ids, media_index, rows), AttentionContext(torch.arange(tokens), causal))
    logprobs, entropy = model.token_logprobs(
        hidden[:-1], ids[1:], temperature=0.8, chunk=8, with_entropy=True
    )
    assert entropy is not None
    loss = (logprobs * torch.randn(tokens - 1, generator=g)).sum() + 0.1 * entropy.sum()
    loss.backward()
    gradients = {f"grad {name}": gradient for name, gradient in hf_gradients(model).items()}
    results = {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "logits": model.language.logits(hidden),
    }
    return results | gradients


def on_two_ranks(rank: int, directory: str) -> dict[str, Any]:
    """Everything the tests compare."""
    topology = start(tensor=2)
    results: dict[str, Any] = {"logprobs": _logprobs(topology)}
    model = build_model(vlm_config(), topology, get_platform("cpu"), seed=3)
    results["weights"] = {name: tensor.clone() for name, tensor in export_hf(model)}
    results["step"] = vlm_step(model)
    results["sharded"] = sorted(
        n for n, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)
    )
    save_hf(model, Path(directory) / "saved")
    other = build_model(vlm_config(), topology, get_platform("cpu"), seed=4)
    load_hf_directory(other, Path(directory) / "saved")
    results["reloaded"] = {name: tensor.clone() for name, tensor in export_hf(other)}
    results["single token"] = vlm_single_token(model)
    results["errors"] = _errors(topology)
    results["decoder"] = [decoder_errors(case, topology) for case in CASES]
    results["decoder"].append(decoder_errors(CASES[1], replace(topology, sequence_parallel=False)))
    return results


def vlm_single_token(model: VisionLanguageModel) -> Tensor:
    """Hidden state of one token alone, as in decoding: fewer tokens than ranks."""
    with torch.no_grad():
        hidden = model(model.language.embed(torch.tensor([5])), AttentionContext(torch.tensor([17]), causal))
    assert not hidden.requires_grad
    return hidden


def _logprobs(topology: Topology) -> list[Tensor]:
    inputs = logprob_inputs()
    hidden = inputs.hidden.float().requires_grad_()
    first = topology.tensor_rank * 26
    weight = inputs.weight.float()[first : first + 26].clone().requires_grad_()
    logprobs, entropy = token_logprobs(
        hidden, weight, inputs.targets, topology=topology, temperature=0.7, chunk=6, with_entropy=True
    )
    assert entropy is not None
    ((logprobs * inputs.upstream[0]).sum() + (entropy * inputs.upstream[1]).sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    total = hidden.grad.clone()
    dist.all_reduce(total, group=topology.tensor_group)
    padded = torch.nn.functional.pad(weight.grad, (0, 0, 0, 26 - weight.shape[0]))
    parts = [torch.empty_like(padded) for _ in range(2)]
    dist.all_gather(parts, padded, group=topology.tensor_group)
    return [logprobs.detach(), entropy.detach(), total, torch.cat(parts)[:51]]


def _errors(topology: Topology) -> list[str]:
    """Messages of configurations that two tensor-parallel ranks cannot hold, or targets no rank knows."""
    changes = [
        dict(num_heads=3, num_kv_heads=3, head_dim=16),
        dict(ffn_hidden_size=49),
        dict(vocab_size=None),
    ]
    messages = []
    for change in changes:
        values = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "ffn_hidden_size": 48, "vocab_size": 61}
        try:
            build_model(
                ModelConfig(language=LanguageConfig(**{**values, **change})), topology, get_platform("cpu")
            )
            messages.append("")
        except MegavilaError as error:
            messages.append(str(error))
    return messages
