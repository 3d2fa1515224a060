"""Weights out of shared memory into a vLLM of another process: an engine for vLLM's weight-transfer API.

Imported in that process only. See docs.vllm.ai, "Weight Transfer".
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngineFactory,
)
from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "megavila_shared_memory"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """memory: name of the block that weights will be written to."""

    memory: str


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """tensors: (name, dtype, shape, offset in bytes) of what lies in the block now."""

    tensors: list[tuple[str, str, list[int], int]]


class SharedMemoryTransferEngine(WeightTransferEngine):
    """Reads tensors in checkpoint format where the trainer wrote them; vLLM cuts, fuses and repacks them."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    _memory: SharedMemory | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self._memory = SharedMemory(name=init_info.memory)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it waits for an accelerator, and there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        assert self._memory is not None
        weights = []
        for name, dtype, shape, offset in update_info.tensors:
            kind, count = getattr(torch, dtype), torch.Size(shape).numel()
            found = torch.frombuffer(self._memory.buf, dtype=kind, count=count, offset=offset)
            # vLLM keeps what it is given until a layer is complete, and the trainer writes over the block before.
            weights.append((name, found.view(shape).clone()))
        self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def register() -> None:
    """Make the engine known to this process's vLLM, under the name BACKEND."""
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransferEngine)
