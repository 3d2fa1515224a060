"""Stage 1: videos become rows of the language model, each frame decoded and encoded once."""

from collections.abc import Sequence
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
    encode = _Encoder(model, loader, store, grad)
    return torch.cat([encode(video) for video in videos])


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
    encode = _Encoder(model, loader, store, grad)
    return [
        torch.cat([encode(video) for video in prompt.videos]) if prompt.videos else None for prompt in prompts
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
        self.done: dict[StoreKey, Tensor] = {}

    def __call__(self, video: SampledVideo) -> Tensor:
        if self.model.vision is None:
            raise MegavilaError(f"{video.path}: this model has no vision tower; set model.vision")
        side = self.model.vision.config.image_size
        key = StoreKey(f"{video.fingerprint}/{video.stream}", video.frame_ids, (side, side), self.weights)
        if key not in self.done:
            self.done[key] = self._encode(video, side) if self.grad else self._from_store(key, video, side)
        return self.done[key]

    def _from_store(self, key: StoreKey, video: SampledVideo, side: int) -> Tensor:
        rows = self.store.get(key)
        if rows is None:
            with torch.no_grad():
                rows = self._encode(video, side)
            self.store.put(key, rows)
        return rows.to(self.device)

    def _encode(self, video: SampledVideo, side: int) -> Tensor:
        encoded = []
        for start in range(0, video.num_frames, FRAMES_PER_SLICE):
            stop = min(start + FRAMES_PER_SLICE, video.num_frames)
            frames = self.loader(video, (side, side), start, stop)
            encoded.append(self.model.encode_frames(frames.to(self.device)))
            self.store.counters.frames_encoded += stop - start
        return self.model.media_rows(torch.cat(encoded))
