"""Videos of prompts as rows of the language model, encoded as seldom as training the tower allows."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from megavila.config import TrainingRoot
from megavila.data.prompt import Prompt
from megavila.media import FrameCache, MediaError, SampledVideo, get_decoder
from megavila.models import VisionLanguageModel
from megavila.mrsp.encode import encode_prompts
from megavila.mrsp.store import EmbeddingStore
from megavila.runtime.logging import get_logger
from megavila.runtime.timers import Timers
from megavila.training.tally import Tally

logger = get_logger(__name__)

_GIB = 2**30


class MediaEncoder:
    """Media rows of prompts: kept for rollouts, with gradient where tower or projector train."""

    def __init__(
        self,
        config: TrainingRoot,
        model: VisionLanguageModel,
        timers: Timers,
        frames: FrameCache | None = None,
    ) -> None:
        self.model = model
        self.timers = timers
        self.skip_bad = config.data.on_bad_media == "skip"
        if frames is None:
            frames = FrameCache(int(config.data.cache_frames_gib * _GIB), get_decoder(config.data.decoder))
        self.frames = frames
        kept = 0.0 if config.mrsp.reuse == "none" else config.mrsp.store_gib
        self.store = EmbeddingStore(int(kept * _GIB))
        parts = [part for part in (model.vision, model.projector) if part is not None]
        trains = any(p.requires_grad for part in parts for p in part.parameters())
        self.encode_again = trains or config.mrsp.reuse != "step"
        self._reported = replace(self.store.counters)

    def rows(self, prompts: Sequence[Prompt]) -> list[Tensor | None | MediaError]:
        """Return each prompt's media rows (rows, hidden) without gradient, or None where it has no video.

        A video that cannot be decoded is an error or, with data.on_bad_media=skip, stands in its prompt's
        place.
        """
        return self._each(prompts, lambda some: self._encode(some, grad=False))

    def decode(self, prompts: Sequence[Prompt]) -> list[Tensor | None | MediaError]:
        """Decode frames that a pass with gradient will encode; return None or a MediaError for each prompt.

        For training without rollouts: with it a damaged video is met before the step, and no frame is
        encoded only to be encoded again with gradient.
        """
        return self._each(prompts, self._decode)

    def _each(
        self,
        prompts: Sequence[Prompt],
        action: Callable[[Sequence[Prompt]], list[Tensor | None]],
    ) -> list[Tensor | None | MediaError]:
        if not self.skip_bad:
            return [*action(prompts)]
        found: list[Tensor | None | MediaError] = []
        for prompt in prompts:
            try:
                found += action([prompt])
            except MediaError as error:
                found.append(error)
        return found

    def _decode(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        if self.model.vision is not None:
            side = self.model.vision.config.image_size
            for video in {video for prompt in prompts for video in prompt.videos}:
                self._load(video, (side, side))
        return [None] * len(prompts)

    def rows_for_training(
        self, prompts: Sequence[Prompt], media_rows: Sequence[Tensor | None], *, grad: bool
    ) -> list[Tensor | None]:
        """Return the media rows of prompts for a pass over their responses.

        Args:
            media_rows: what `rows` gave when the step began: still right while tower and projector are
                frozen.
            grad: whether the pass has a backward pass.
        """
        return self._encode(prompts, grad=grad) if self.encode_again else list(media_rows)

    def _encode(self, prompts: Sequence[Prompt], *, grad: bool) -> list[Tensor | None]:
        with self.timers("time/encode"):
            return encode_prompts(self.model, prompts, self._load, self.store, grad=grad)

    def _load(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        with self.timers("time/decode"):
            return self.frames.load(video, size, start, stop)

    def report(self, tokens_per_frame: int, tally: Tally) -> None:
        """Count what was done since the last report."""
        before, now = self._reported, self.store.counters
        self._reported = replace(now)
        tally.total("store/hits", now.hits - before.hits)
        tally.total("store/misses", now.misses - before.misses)
        tally.total("store/bytes", self.store.used_bytes)
        tally.total("tokens/vision", (now.frames_encoded - before.frames_encoded) * tokens_per_frame)
