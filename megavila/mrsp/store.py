"""Encoded videos kept in memory, so that rollout, log-probs and update look at each frame once."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megavila.mrsp.placement import Slices
from megavila.runtime.logging import get_logger

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_log = get_logger(__name__)


@dataclass(frozen=True)
class StoreKey:
    """What is kept depends on: the file's content, its sampled frames, their preprocessing, and the weights."""

    content: str
    frame_ids: tuple[int, ...]
    pixels: str  # decoder and resolution
    weights: str  # values and settings of the modules that the frames went through

    @property
    def video(self) -> str:
        """Digest of everything but the weights."""
        text = repr((self.content, self.frame_ids, self.pixels))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class StoreCounters:
    """What happened on this rank since the store was made.

    Frames are counted once for every time they were worked on.
    """

    hits: int = 0
    misses: int = 0
    evicted: int = 0  # entries that left for want of room
    stale: int = 0  # entries that were of no use because the weights had changed, in memory or on disk
    corrupt: int = 0  # files that could not be read or did not have their checksum
    frames_encoded: int = 0
    frames_encoded_with_grad: int = 0
    frames_from_disk: int = 0


@dataclass(frozen=True, eq=False)
class Kept:
    """A video's frames as this rank keeps them: those of its own slice, (frames or windows, …, D)."""

    slices: Slices
    rows: Tensor
    bytes_by_rank: tuple[int, ...]


class EmbeddingStore:
    """Encoded slices of videos, up to `limit_bytes` on each rank, the least recently used leaving first.

    Ranks of an MR-SP group each keep the slice that they encoded: one copy of a video in the whole group, and
    no traffic to make it so. What is kept where is known on every rank without a word between them, because
    all look up, keep and forget the same videos in the same order: one leaves as soon as *any* rank is full.

    One store serves one tower and projector: entries of other weights leave at the first look-up after a
    change. Tensors are kept detached, on the device they come in, and are shared: not to be written.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.counters = StoreCounters()
        self._weights: str | None = None
        self._kept: OrderedDict[StoreKey, Kept] = OrderedDict()
        self._used: list[int] = []  # bytes of each rank
        self._warned = False

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used_bytes(self) -> int:
        """Bytes kept on this rank."""
        return sum(kept.rows.nbytes for kept in self._kept.values())

    def get(self, key: StoreKey) -> Kept | None:
        """What is kept under `key`, or None."""
        self._drop_stale(key.weights)
        kept = self._kept.get(key)
        if kept is None:
            self.counters.misses += 1
            return None
        self.counters.hits += 1
        self._kept.move_to_end(key)
        return kept

    def put(self, key: StoreKey, kept: Kept) -> None:
        """Keep a video unless it alone exceeds the limit on some rank; a limit of 0 keeps nothing."""
        if self.limit_bytes == 0:
            return
        self._drop_stale(key.weights)
        if key in self._kept:
            self._remove(key)
        if max(kept.bytes_by_rank) > self.limit_bytes:
            self._evicted(f"a video's {max(kept.bytes_by_rank)} bytes")
            return
        # A slice would keep the whole tensor that it is a part of in memory.
        rows = kept.rows.detach()
        if rows.untyped_storage().nbytes() > rows.nbytes:
            rows = rows.clone()
        self._kept[key] = Kept(kept.slices, rows, kept.bytes_by_rank)
        self._used = _add(self._used, kept.bytes_by_rank, 1)
        while max(self._used) > self.limit_bytes:
            self._remove(next(iter(self._kept)))
            self._evicted("the videos in use")

    def clear(self) -> None:
        """Forget all rows; the counters go on."""
        self._kept.clear()
        self._used = []

    def _evicted(self, what: str) -> None:
        self.counters.evicted += 1
        if not self._warned:
            self._warned = True
            _log.warning(
                f"{what} exceed the {self.limit_bytes} bytes for embeddings on a rank: videos that leave are "
                "encoded again when they are next needed; raise mrsp.store_gib"
            )

    def _drop_stale(self, weights: str) -> None:
        if self._weights != weights:
            self.counters.stale += len(self._kept)
            self.clear()
            self._weights = weights

    def _remove(self, key: StoreKey) -> None:
        self._used = _add(self._used, self._kept.pop(key).bytes_by_rank, -1)


def _add(used: list[int], other: tuple[int, ...], sign: int) -> list[int]:
    return [a + sign * b for a, b in zip(used or [0] * len(other), other, strict=True)]


@torch.no_grad()
def weights_fingerprint(modules: Iterable[nn.Module | None], settings: str = "") -> str:
    """Identity of all parameters' and buffers' values, computed on their device, and of `settings`.

    Sums of the values' bit patterns, which any optimizer step changes. It reads the weights themselves, because
    version counters miss updates through `.data` and flat buffers.
    """
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
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
