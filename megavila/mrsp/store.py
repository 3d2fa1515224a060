"""Encoded videos kept in memory, so that rollout, log-probs and update look at each frame once."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StoreKey:
    """What rows depend on: the file's content, its sampled frames, their preprocessing, and the weights."""

    content: str
    frame_ids: tuple[int, ...]
    size: tuple[int, int]
    weights: str


@dataclass
class StoreCounters:
    """What happened since the store was made; frames are counted once for every time they were worked on."""

    hits: int = 0
    misses: int = 0
    evicted: int = 0  # entries that left for want of room
    stale: int = 0  # entries that left because the weights had changed
    frames_encoded: int = 0


class EmbeddingStore:
    """Rows of encoded videos up to `limit_bytes`, the least recently used leaving first.

    One store serves one tower and projector: entries of other weights leave at the first look-up after a
    change. Rows are kept detached, in the dtype and on the device they come in, and are shared: not to be
    written.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.counters = StoreCounters()
        self._weights: str | None = None
        self._rows: OrderedDict[StoreKey, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: StoreKey) -> Tensor | None:
        """The rows kept under `key`, or None."""
        self._drop_stale(key.weights)
        rows = self._rows.get(key)
        if rows is None:
            self.counters.misses += 1
            return None
        self.counters.hits += 1
        self._rows.move_to_end(key)
        return rows

    def put(self, key: StoreKey, rows: Tensor) -> None:
        """Keep `rows` unless they alone exceed the limit."""
        self._drop_stale(key.weights)
        if key in self._rows:
            self._remove(key)
        if rows.nbytes > self.limit_bytes:
            return
        # A slice would keep the whole tensor that it is a part of in memory.
        kept = rows.detach()
        self._rows[key] = kept.clone() if kept.untyped_storage().nbytes() > kept.nbytes else kept
        self.used_bytes += kept.nbytes
        while self.used_bytes > self.limit_bytes:
            self._remove(next(iter(self._rows)))
            self.counters.evicted += 1

    def clear(self) -> None:
        """Forget all rows; the counters go on."""
        self._rows.clear()
        self.used_bytes = 0

    def _drop_stale(self, weights: str) -> None:
        if self._weights != weights:
            self.counters.stale += len(self._rows)
            self.clear()
            self._weights = weights

    def _remove(self, key: StoreKey) -> None:
        self.used_bytes -= self._rows.pop(key).nbytes


@torch.no_grad()
def weights_fingerprint(modules: Iterable[nn.Module | None]) -> str:
    """Identity of all parameters' and buffers' values, computed on their device.

    Sums of the values' bit patterns, which any optimizer step changes. It reads the weights themselves, because
    version counters miss updates through `.data` and flat buffers.
    """
    digest = hashlib.blake2b(digest_size=16)
    sums = []
    for module in modules:
        if module is None:
            continue
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype};".encode())
            sums.append(
                tensor.contiguous().view(-1).view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
            )
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()
