"""The vision-language model: tower, projector and decoder, joined by explicit row indices."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megavila.config import ModelConfig
from megavila.models.attention import AttentionContext
from megavila.models.language import LanguageModel
from megavila.models.logprobs import token_logprobs
from megavila.models.projector import Projector, pool_frames
from megavila.models.vision import SiglipVisionTower
from megavila.runtime.errors import MegavilaError

# SigLIP's image processor: (x / 255 - mean) / std.
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5


class VisionLanguageModel(nn.Module):
    """A decoder that reads text tokens and rows of video.

    Args:
        config: with `language` set; `vision` None gives a text-only model.
        max_frames_per_batch: frames the tower sees at one time, which bounds its activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        language: LanguageModel,
        vision: SiglipVisionTower | None,
        projector: Projector | None,
        *,
        max_frames_per_batch: int = 64,
    ) -> None:
        super().__init__()
        self.config = config
        self.language = language
        self.vision = vision
        self.projector = projector
        self.max_frames_per_batch = max_frames_per_batch

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return self.language.output_weight().dtype

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """frames (n, 3, h, w) uint8 -> (n, tokens_per_frame, hidden).

        Frames are encoded one by one, whatever the batch. With `recompute: full` the activations of what trains
        are computed again in the backward pass.
        """
        projector = self._encoders()[1]
        return self._in_batches(
            lambda batch: projector(self._features(batch)), self._checked(frames), self._encoders()
        )

    def frame_features(self, frames: torch.Tensor) -> torch.Tensor:
        """frames (n, 3, h, w) uint8 -> the tower's features (n, patches, vision_hidden), for `project`."""
        return self._in_batches(self._features, self._checked(frames), self._encoders()[:1])

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """features (n, patches, vision_hidden) -> (n, tokens_per_frame, hidden)."""
        projector = self._encoders()[1]
        return self._in_batches(projector, features, (projector,))

    def _encoders(self) -> tuple[SiglipVisionTower, Projector]:
        if self.vision is None or self.projector is None:
            raise MegavilaError("this model has no vision tower but was given frames; set model.vision")
        return self.vision, self.projector

    def _checked(self, frames: torch.Tensor) -> torch.Tensor:
        size = self._encoders()[0].config.image_size
        if frames.dtype != torch.uint8 or frames.shape[1:] != (3, size, size):
            raise MegavilaError(
                f"frames are {frames.dtype} {tuple(frames.shape)}, must be uint8 (n, 3, {size}, {size}); "
                "decode them at model.vision.image_size"
            )
        return frames

    def _features(self, frames: torch.Tensor) -> torch.Tensor:
        pixels = frames.to(self.dtype).mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD)
        return self._encoders()[0](pixels)

    def _in_batches(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        modules: Sequence[nn.Module],
    ) -> torch.Tensor:
        trained = any(parameter.requires_grad for module in modules for parameter in module.parameters())
        recompute = self.config.recompute != "none" and trained and torch.is_grad_enabled()
        encoded = [
            checkpoint(encode, batch, use_reentrant=False) if recompute else encode(batch)
            for batch in inputs.split(self.max_frames_per_batch)
        ]
        return encoded[0] if len(encoded) == 1 else torch.cat(encoded)  # type: ignore[arg-type]

    def media_rows(self, encoded: torch.Tensor) -> torch.Tensor:
        """Encoded frames of one video, (n, tokens_per_frame, hidden) -> its media rows (rows, hidden).

        Applies temporal pooling; `num_media_rows` says how many rows come out.
        """
        return pool_frames(encoded, self.config.projector.temporal_pooling).flatten(0, 1)

    def embed(
        self, token_ids: torch.Tensor, media_index: torch.Tensor, media_rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Text rows from the embedding table, media rows scattered among them; differentiable in both.

        token_ids: (t,); what stands at media positions is not looked up.
        media_index: (t,), a media position's row of `media_rows`, -1 for text; positions may share a row.
        media_rows: (m, hidden), or None where there is no media.
        Returns (t, hidden). Raises MegavilaError unless the highest index is the last row.
        """
        if token_ids.shape != media_index.shape:
            raise MegavilaError(
                f"{tuple(token_ids.shape)} token ids but {tuple(media_index.shape)} media indices"
            )
        rows = 0 if media_rows is None else media_rows.shape[0]
        named = int(media_index.max()) + 1 if media_index.numel() else 0
        if named != rows:
            raise MegavilaError(
                f"the prompt names {named} media rows but {rows} were given; "
                "encode the same frames the prompt was built from"
            )
        if media_rows is None:
            return self.language.embed(token_ids)
        is_media = media_index >= 0
        text = self.language.embed(token_ids.masked_fill(is_media, 0))
        positions = is_media.nonzero().squeeze(1)
        media = media_rows.to(text.dtype).index_select(0, media_index[positions])
        return text.index_copy(0, positions, media)

    def forward(self, embeddings: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """embeddings (t, hidden) -> hidden states (t, hidden), final norm applied."""
        return self.language(embeddings, context)

    def token_logprobs(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float = 1.0,
        chunk: int = 1024,
        with_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of `targets` (n,) given hidden states (n, hidden); see `token_logprobs`."""
        return token_logprobs(
            hidden,
            self.language.output_weight(),
            targets,
            topology=self.language.topology,
            temperature=temperature,
            chunk=chunk,
            with_entropy=with_entropy,
        )
