"""Stage 1: videos become rows of the language model, each frame decoded and encoded once."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megavila.data.prompt import Prompt
from megavila.media import SampledVideo
from megavila.models.vlm import VisionLanguageModel
from megavila.mrsp.store import EmbeddingStore, StoreKey, weights_fingerprint
from megavila.runtime.errors import MegavilaError

# Decoded frames held at one time; they are encoded before the next are loaded.
FRAMES_PER_SLICE = 256


class FrameLoader(Protocol):
    """`megavila.media.load_frames` or a FrameCache's `load`."""

    def __call__(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Sampled frames start to stop as uint8 (stop - start, 3, height, width); raises MediaError."""
        ...


def encode_videos(
    model: VisionLanguageModel,
    videos: Sequence[SampledVideo],
    loader: FrameLoader,
    store: EmbeddingStore,
    *,
    grad: bool,
) -> Tensor:
    """Media rows (rows, hidden) of these videos, concatenated in order, on the model's device.

    Args:
        model: with tower and projector.
        videos: at least one; one that occurs several times is encoded once.
        loader: where frames come from.
        store: where rows are kept and looked for, unless they carry gradient.
        grad: let gradient flow into tower and projector, as far as they train. Such rows belong to one update
            and are not kept.

    Raises MediaError for a video that cannot be read; whether to skip it is the caller's policy.
    """
    rows = _Encoder(model, loader, store, grad)(videos)
    return torch.cat([rows[video] for video in videos])


def encode_prompts(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    loader: FrameLoader,
    store: EmbeddingStore,
    *,
    grad: bool,
) -> list[Tensor | None]:
    """Media rows of each prompt, None for a prompt without video; see `encode_videos`.

    Prompts that ask about the same frames share one encoding, with gradient too.
    """
    rows = _Encoder(model, loader, store, grad)([video for prompt in prompts for video in prompt.videos])
    return [
        torch.cat([rows[video] for video in prompt.videos]) if prompt.videos else None for prompt in prompts
    ]


class _Encoder:
    """Encodes videos for one call: weights are looked at once, and each distinct video at most once."""

    def __init__(
        self, model: VisionLanguageModel, loader: FrameLoader, store: EmbeddingStore, grad: bool
    ) -> None:
        parts = [part for part in (model.vision, model.projector) if part is not None]
        self.model, self.loader, self.store = model, loader, store
        self.grad = grad and torch.is_grad_enabled()
        self.grad = self.grad and any(p.requires_grad for part in parts for p in part.parameters())
        self.weights = "" if self.grad else weights_fingerprint(parts)
        self.device = model.language.output_weight().device

    def __call__(self, videos: Sequence[SampledVideo]) -> dict[SampledVideo, Tensor]:
        """Media rows of each distinct video."""
        if not videos:
            return {}
        if self.model.vision is None:
            raise MegavilaError(f"{videos[0].path}: this model has no vision tower; set model.vision")
        side = self.model.vision.config.image_size
        keys = {
            video: StoreKey(
                f"{video.fingerprint}/{video.stream}", video.frame_ids, (side, side), self.weights
            )
            for video in videos
        }
        one_of = {key: video for video, key in keys.items()}
        found: dict[StoreKey, Tensor] = {}
        if not self.grad:
            kept = ((key, self.store.get(key)) for key in one_of)
            found = {key: rows.to(self.device) for key, rows in kept if rows is not None}
        with torch.set_grad_enabled(self.grad):
            for batch in _batches([key for key in one_of if key not in found]):
                rows = self._encode([one_of[key] for key in batch], side)
                found |= zip(batch, rows, strict=True)
                if not self.grad:
                    for key, row in zip(batch, rows, strict=True):
                        self.store.put(key, row)
        return {video: found[key] for video, key in keys.items()}

    def _encode(self, videos: Sequence[SampledVideo], side: int) -> list[Tensor]:
        """Rows of videos whose frames go through the tower together; of a long one, a slice at a time."""
        encoded = []
        for start in range(0, max(video.num_frames for video in videos), FRAMES_PER_SLICE):
            stop = start + FRAMES_PER_SLICE
            frames = [
                self.loader(video, (side, side), start, min(stop, video.num_frames)) for video in videos
            ]
            encoded.append(self.model.encode_frames(torch.cat(frames).to(self.device)))
        every = torch.cat(encoded)
        self.store.counters.frames_encoded += len(every)
        pieces = every.split([video.num_frames for video in videos])
        return [self.model.media_rows(piece) for piece in pieces]


def _batches(keys: Sequence[StoreKey]) -> Iterator[list[StoreKey]]:
    """Videos of together at most FRAMES_PER_SLICE frames; a longer one is alone."""
    batch: list[StoreKey] = []
    frames = 0
    for key in keys:
        if batch and frames + len(key.frame_ids) > FRAMES_PER_SLICE:
            yield batch
            batch, frames = [], 0
        batch.append(key)
        frames += len(key.frame_ids)
    if batch:
        yield batch
