"""Stage 1: videos become rows of the language model, each frame decoded and encoded once, by one rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from megavila.config import MrspConfig
from megavila.media import MediaError, SampledVideo
from megavila.models.projector import pool_frames, tokens_per_frame
from megavila.models.vlm import VisionLanguageModel
from megavila.mrsp.disk import DiskStore
from megavila.mrsp.placement import Placement, Slices
from megavila.mrsp.shards import ShardedRows
from megavila.mrsp.store import EmbeddingStore, Kept, StoreKey, weights_fingerprint
from megavila.runtime.collectives import gather_objects
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger
from megavila.runtime.topology import Topology

# Decoded frames held at one time; they are encoded before the next are loaded.
FRAMES_PER_SLICE = 256

_log = get_logger(__name__)

Stage = Literal["features", "rows"]


class FrameLoader(Protocol):
    """`megavila.media.load_frames` or a FrameCache's `load`."""

    def __call__(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Sampled frames start to stop as uint8 (stop - start, 3, height, width); raises MediaError."""
        ...


@dataclass(frozen=True)
class _Piece:
    """Frames [start, stop) of a video that this rank encodes."""

    key: StoreKey
    video: SampledVideo
    start: int
    stop: int


class VideoEncoder:
    """Encodes videos on the ranks of an MR-SP group, which call it together with the same videos.

    What is kept in the store is the last result that training leaves alone. Tower and projector frozen: media
    rows. Only the tower frozen: its features, and the projector runs in every pass. Neither: rows, for passes
    without gradient.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        loader: FrameLoader,
        store: EmbeddingStore,
        topology: Topology,
        *,
        sharded: bool = True,
        decoder: str = "pyav",
        store_dtype: torch.dtype | None = None,
        disk: DiskStore | None = None,
    ) -> None:
        """
        Args:
            model: the same weights on all ranks.
            loader: where frames come from.
            store: where encoded videos are kept and looked for.
            topology: supplies the MR-SP group.
            sharded: each rank encodes its slice of the frames; False: each rank encodes all of them.
            decoder: name of the loader's decoder: another one's pixels are other pixels.
            store_dtype: what is kept is rounded to it, in the pass that encodes it too; None: the model's.
            disk: a second place to look for what the store does not have; only weights that stay frozen are
                worth a disk, so it is left alone while the tower trains.
        """
        self.model, self.loader, self.store, self.topology = model, loader, store, topology
        self.sharded = sharded and topology.mrsp_size > 1
        self.decoder = decoder
        self.store_dtype = store_dtype or model.dtype
        self.trains_tower, self.trains_projector = _trains(model.vision), _trains(model.projector)
        self.stage: Stage = "features" if self.trains_projector and not self.trains_tower else "rows"
        self.disk = None if self.trains_tower else disk
        if disk is not None and self.trains_tower:
            _log.warning(
                "mrsp.store_dir is not used: the vision tower trains, so nothing that it encodes lasts"
            )
        ranks = topology.mrsp_size if self.sharded else 1
        self.rank = topology.mrsp_rank if self.sharded else 0
        self.pooling = model.config.projector.temporal_pooling
        self.placement = Placement(ranks, self.pooling)
        self.device = model.language.output_weight().device

    @classmethod
    def from_config(
        cls,
        options: MrspConfig,
        model: VisionLanguageModel,
        loader: FrameLoader,
        topology: Topology,
        decoder: str,
    ) -> "VideoEncoder":
        """The encoder that `options` ask for, with a store of its own, empty unless videos are reused.

        Raises MegavilaError where mrsp.store_dir cannot be made.
        """
        store = EmbeddingStore(int(options.store_gib * 2**30) if options.reuse == "step" else 0)
        disk = None if options.store_dir is None else DiskStore(Path(options.store_dir), store.counters)
        dtype = None if options.store_dtype == "auto" else getattr(torch, options.store_dtype)
        sharded = options.encode == "sharded"
        return cls(
            model, loader, store, topology, sharded=sharded, decoder=decoder, store_dtype=dtype, disk=disk
        )

    def encode(
        self, videos: Sequence[SampledVideo], *, grad: bool = False, keep: bool = True
    ) -> dict[SampledVideo, ShardedRows | MediaError]:
        """Media rows of each distinct video, or why it cannot be decoded (then so on every rank).

        Args:
            videos: one that occurs several times, or under several paths, is encoded once.
            grad: let gradient flow into tower and projector, as far as they train. Rows with the tower's
                gradient belong to one update and are not kept.
            keep: take from the store what it has, and keep there what is encoded.
        """
        grad = grad and torch.is_grad_enabled() and (self.trains_tower or self.trains_projector)
        keep = keep and not (grad and self.trains_tower)
        keys = self._keys(videos, self._weights() if keep and videos else "")
        one_of = {key: video for video, key in keys.items()}
        kept: dict[StoreKey, Kept] = {}
        if keep:
            kept = {key: entry for key in one_of if (entry := self.store.get(key)) is not None}
        missing = {key: video for key, video in one_of.items() if key not in kept}
        # The tower runs with gradient only where it trains; a projector that trains alone comes later.
        with torch.set_grad_enabled(grad and self.trains_tower):
            encoded, errors = self._encode_missing(missing, keep)
        kept |= encoded
        if keep:
            for key, entry in encoded.items():
                self.store.put(key, entry)
        with torch.set_grad_enabled(grad):
            rows = {key: self._rows(key, entry, grad) for key, entry in kept.items()}
        return {video: errors[key] if key in errors else rows[key] for video, key in keys.items()}

    def encode_or_raise(
        self, videos: Sequence[SampledVideo], *, grad: bool = False, keep: bool = True
    ) -> list[ShardedRows]:
        """As `encode`, one entry for each of `videos`; raises the MediaError of the first that has one."""
        found = self.encode(videos, grad=grad, keep=keep)
        rows = []
        for video in videos:
            entry = found[video]
            if isinstance(entry, MediaError):
                raise entry
            rows.append(entry)
        return rows

    def decode(self, videos: Sequence[SampledVideo]) -> dict[SampledVideo, MediaError]:
        """Load each rank's frames, for a loader that keeps them; the videos that cannot be decoded."""
        keys = self._keys(videos, "")
        errors: dict[StoreKey, MediaError] = {}
        for piece in self._own_pieces({key: video for video, key in keys.items()}):
            self._load(piece, errors)
        errors = self._agree(errors)
        return {video: errors[key] for video, key in keys.items() if key in errors}

    def _keys(self, videos: Sequence[SampledVideo], weights: str) -> dict[SampledVideo, StoreKey]:
        if not videos:
            return {}
        if self.model.vision is None:
            raise MegavilaError(f"{videos[0].path}: this model has no vision tower; set model.vision")
        pixels = f"{self.decoder} {self.model.vision.config.image_size}"
        return {
            video: StoreKey(f"{video.fingerprint}/{video.stream}", video.frame_ids, pixels, weights)
            for video in dict.fromkeys(videos)
        }

    def _weights(self) -> str:
        """Identity of what frames go through before they are kept; the same on all ranks, or it is an error."""
        config, parts = self.model.config, [self.model.vision]
        if self.stage == "rows":
            parts.append(self.model.projector)  # type: ignore[arg-type]
        settings = f"{self.stage} {self.store_dtype} {config.vision}"
        if self.stage == "rows":
            settings += f" {config.projector}"
        weights = weights_fingerprint(parts, settings)
        if self.sharded:
            found = gather_objects(weights, self.topology.mrsp_group)
            if len(set(found)) > 1:
                raise MegavilaError(
                    "the ranks of a model replica have different weights in vision tower or projector "
                    f"({', '.join(found)}); load the same checkpoint on all of them"
                )
        return weights

    def _slices(self, videos: Mapping[StoreKey, SampledVideo]) -> dict[StoreKey, Slices]:
        placed = self.placement.place({key.video: len(key.frame_ids) for key in videos})
        return {key: placed[key.video] for key in videos}

    def _own_pieces(self, videos: Mapping[StoreKey, SampledVideo]) -> list[_Piece]:
        return [
            piece
            for key, slices in self._slices(videos).items()
            for piece in self._cut(key, videos[key], *slices[self.rank])
        ]

    def _cut(self, key: StoreKey, video: SampledVideo, start: int, stop: int) -> Iterator[_Piece]:
        """Pieces of whole pooling windows and at most FRAMES_PER_SLICE frames."""
        step = max(self.pooling, FRAMES_PER_SLICE // self.pooling * self.pooling)
        for first in range(start, stop, step):
            yield _Piece(key, video, first, min(first + step, stop))

    def _encode_missing(
        self, videos: Mapping[StoreKey, SampledVideo], keep: bool
    ) -> tuple[dict[StoreKey, Kept], dict[StoreKey, MediaError]]:
        """This rank's slice of each video that all ranks can decode, and why the others cannot be."""
        slices = self._slices(videos)
        found: dict[StoreKey, list[tuple[int, Tensor]]] = {key: [] for key in videos}
        todo: list[_Piece] = []
        disk = self.disk if keep else None
        for key, video in videos.items():
            at, stop = slices[key][self.rank]
            unit = self.pooling if self.stage == "rows" else 1
            for first, last, part in disk.read(key, at, stop, unit) if disk is not None and at < stop else ():
                todo += self._cut(key, video, at, first)
                found[key].append((first, part.to(self.device)))
                at = last
            todo += self._cut(key, video, at, stop)
        errors: dict[StoreKey, MediaError] = {}
        for batch in _batches(todo):
            for piece, part in self._encode_batch(batch, errors):
                stored = part.to(self.store_dtype) if keep else part
                found[piece.key].append((piece.start, stored))
                if disk is not None:
                    disk.write(piece.key, piece.start, piece.stop, stored)
        errors = self._agree(errors)
        encoded = {
            key: Kept(slices[key], _join(parts), self._bytes_by_rank(slices[key]))
            for key, parts in found.items()
            if key not in errors
        }
        return encoded, errors

    def _encode_batch(
        self, batch: Sequence[_Piece], errors: dict[StoreKey, MediaError]
    ) -> Iterator[tuple[_Piece, Tensor]]:
        """Pieces that could be loaded, with their features or rows, (frames or windows, …, D)."""
        loaded = {piece: frames for piece in batch if (frames := self._load(piece, errors)) is not None}
        if not loaded:
            return
        frames = torch.cat(list(loaded.values())).to(self.device)
        encode = self.model.frame_features if self.stage == "features" else self.model.encode_frames
        self.store.counters.frames_encoded += len(frames)
        if torch.is_grad_enabled():
            self.store.counters.frames_encoded_with_grad += len(frames)
        for piece, part in zip(loaded, encode(frames).split([len(f) for f in loaded.values()]), strict=True):
            yield piece, part if self.stage == "features" else pool_frames(part, self.pooling)

    def _load(self, piece: _Piece, errors: dict[StoreKey, MediaError]) -> Tensor | None:
        if piece.key in errors:
            return None
        side = self.model.vision.config.image_size  # type: ignore[union-attr]
        try:
            return self.loader(piece.video, (side, side), piece.start, piece.stop)
        except MediaError as error:
            errors[piece.key] = error
            return None

    def _agree(self, errors: dict[StoreKey, MediaError]) -> dict[StoreKey, MediaError]:
        """Errors of all ranks: whoever met one, no rank has that video."""
        if self.topology.mrsp_size == 1:
            return errors
        merged: dict[StoreKey, MediaError] = {}
        for found in gather_objects(errors, self.topology.mrsp_group):
            merged = found | merged
        return merged

    def _rows(self, key: StoreKey, kept: Kept, grad: bool) -> ShardedRows:
        """Media rows from what is kept."""
        language, vision = self.model.config.language, self.model.config.vision
        assert language is not None and vision is not None
        per_frame = tokens_per_frame(vision, self.model.config.projector)
        start, stop = kept.slices[self.rank]
        if start == stop:
            # A rank without frames takes part in the backward pass of the exchange like any other.
            rows = torch.zeros(
                0, language.hidden_size, dtype=self.model.dtype, device=self.device, requires_grad=grad
            )
        else:
            rows = kept.rows.to(self.model.dtype)
            if self.stage == "features":
                rows = pool_frames(self.model.project(rows), self.pooling)
            rows = rows.flatten(0, 1)
        ranges = tuple(
            ((first // self.pooling * per_frame, -(-last // self.pooling) * per_frame),)
            if first < last
            else ()
            for first, last in kept.slices
        )
        total = -(-len(key.frame_ids) // self.pooling) * per_frame
        return ShardedRows(rows, ranges, total, self.topology)

    def _bytes_by_rank(self, slices: Slices) -> tuple[int, ...]:
        config = self.model.config
        assert config.vision is not None and config.language is not None
        if self.stage == "features":
            unit = config.vision.patches_per_side**2 * config.vision.hidden_size
            counts = [stop - start for start, stop in slices]
        else:
            unit = tokens_per_frame(config.vision, config.projector) * config.language.hidden_size
            counts = [-(-(stop - start) // self.pooling) for start, stop in slices]
        return tuple(count * unit * self.store_dtype.itemsize for count in counts)


def mark_partial_gradients(model: VisionLanguageModel, topology: Topology) -> None:
    """Mark what encodes frames as seeing only its rank's part of them, before gradient buffers are made.

    For sharded encoding with tensor parallelism: each rank of a tensor group then has the gradient of its own
    frames, to be summed over the group like that of a weight under sequence parallelism.
    """
    if topology.tensor > 1:
        for part in (model.vision, model.projector):
            for parameter in () if part is None else part.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]


def _trains(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def _join(parts: list[tuple[int, Tensor]]) -> Tensor:
    """Parts of a slice in the order of their frames."""
    tensors = [part for _, part in sorted(parts, key=lambda item: item[0])]
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors) if tensors else torch.zeros(0)


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of together at most FRAMES_PER_SLICE frames."""
    batch: list[_Piece] = []
    frames = 0
    for piece in pieces:
        count = piece.stop - piece.start
        if batch and frames + count > FRAMES_PER_SLICE:
            yield batch
            batch, frames = [], 0
        batch.append(piece)
        frames += count
    if batch:
        yield batch
