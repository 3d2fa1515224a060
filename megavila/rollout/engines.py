"""The engine that a config names, from its opening to its closing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Literal

from megavila.data.tokenizer import Tokenizer
from megavila.models import VisionLanguageModel
from megavila.rollout.megatron import MegatronEngine
from megavila.rollout.protocol import RolloutEngine
from megavila.runtime.topology import Topology


@contextmanager
def open_engine(
    name: str,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    topology: Topology,
    *,
    max_tokens: int,
    max_batch_tokens: int,
    kv_cache_gib: float,
    timeout_seconds: float | None = 600.0,
    retries: int = 2,
    placement: Literal["colocated", "server"] = "colocated",
) -> Iterator[RolloutEngine]:
    """Yield the engine called ``name``, "megatron" or "vllm", and close it in the end.

    Args:
        max_tokens: longest prompt and response together (vllm).
        max_batch_tokens: most tokens whose keys and values are held at once (megatron).
        kv_cache_gib: memory for keys and values on each rank (vllm).
        timeout_seconds: an engine that computes nothing for so long has failed; None: it may (vllm).
        retries: how often prompts that a failure left without responses are tried again (vllm).
        placement: in this process, or in one of its own (vllm).

    Raises:
        MegavilaError: vLLM is not installed, or cannot run this model.
    """
    engine: RolloutEngine
    if name == "vllm":
        from megavila.rollout.vllm import VllmEngine

        engine = VllmEngine(
            model,
            tokenizer,
            topology,
            max_tokens=max_tokens,
            kv_cache_gib=kv_cache_gib,
            timeout_seconds=timeout_seconds,
            retries=retries,
            placement=placement,
        )
    else:
        engine = MegatronEngine(model, tokenizer, topology, max_batch_tokens=max_batch_tokens)
    with closing(engine):
        yield engine
