"""The engine that a config names, from its opening to its closing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from megavila.config import EngineConfig
from megavila.data.tokenizer import Tokenizer
from megavila.models import VisionLanguageModel
from megavila.rollout.megatron import MegatronEngine
from megavila.rollout.protocol import RolloutEngine
from megavila.runtime.topology import Topology


@contextmanager
def open_engine(
    config: EngineConfig,
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    topology: Topology,
    *,
    max_tokens: int,
) -> Iterator[RolloutEngine]:
    """Yield the engine, and close it in the end.

    max_tokens: longest prompt and response together, which vLLM must know. Raises MegavilaError where vLLM is not
    installed, or cannot run this model.
    """
    engine: RolloutEngine
    if config.engine == "vllm":
        from megavila.rollout.vllm import VllmEngine

        engine = VllmEngine(
            model,
            tokenizer,
            topology,
            max_tokens=max_tokens,
            kv_cache_gib=config.kv_cache_gib,
            timeout_seconds=config.timeout_seconds,
            retries=config.retries,
            placement=config.placement,
        )
    else:
        engine = MegatronEngine(model, tokenizer, topology, max_batch_tokens=config.max_batch_tokens)
    with closing(engine):
        yield engine
