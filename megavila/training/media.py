"""Videos of prompts as rows of the language model, encoded as seldom as training the tower allows."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megavila.config import TrainingRoot
from megavila.data.prompt import Prompt
from megavila.media import FrameCache, MediaError, SampledVideo, get_decoder
from megavila.models import VisionLanguageModel
from megavila.mrsp.encode import VideoEncoder
from megavila.mrsp.shards import ShardedRows, join_shards
from megavila.runtime.collectives import gather_objects
from megavila.runtime.timers import Timers
from megavila.runtime.topology import Topology
from megavila.training.tally import Tally
from megavila.training.throughput import ModelWork

_GIB = 2**30


class MediaEncoder:
    """Media rows of prompts: kept for rollouts, with gradient where tower or projector train.

    All ranks of an MR-SP group call its methods together, with the same prompts.
    """

    def __init__(
        self,
        config: TrainingRoot,
        model: VisionLanguageModel,
        topology: Topology,
        timers: Timers,
        frames: FrameCache | None = None,
    ) -> None:
        options = config.mrsp
        self.model = model
        self.topology = topology
        self.timers = timers
        self.reuse = options.reuse
        self.skip_bad = config.data.on_bad_media == "skip"
        if frames is None:
            frames = FrameCache(int(config.data.cache_frames_gib * _GIB), get_decoder(config.data.decoder))
        self.frames = frames
        self.videos = VideoEncoder.from_config(options, model, self._load, topology, config.data.decoder)
        self.store = self.videos.store
        trains = self.videos.trains_tower or self.videos.trains_projector
        self.encode_again = trains or options.reuse != "step"
        self._reported = replace(self.store.counters)
        self._decoded = frames.misses

    def rows(self, prompts: Sequence[Prompt]) -> list[ShardedRows | None | MediaError]:
        """Return each prompt's media rows without gradient, or None where it has no video.

        A video that cannot be decoded is an error or, with data.on_bad_media=skip, stands in its prompt's
        place.
        """
        with self.timers("time/encode"):
            if self.reuse == "none":
                found = [self.videos.encode(prompt.videos, keep=False) for prompt in prompts]
            else:
                encoded = self.videos.encode(_videos(prompts), keep=self.reuse == "step")
                found = [encoded] * len(prompts)
        joined: list[ShardedRows | None | MediaError] = []
        for prompt, encoded in zip(prompts, found, strict=True):
            entries = [encoded[video] for video in prompt.videos]
            error = next((entry for entry in entries if isinstance(entry, MediaError)), None)
            if error is not None and not self.skip_bad:
                raise error
            parts = [entry for entry in entries if isinstance(entry, ShardedRows)]
            joined.append(error or join_shards(parts))
        return joined

    def decode(self, prompts: Sequence[Prompt]) -> list[None | MediaError]:
        """Decode frames that a pass with gradient will encode; return None or a MediaError for each prompt.

        For training without rollouts: with it a damaged video is met before the step, and no frame is
        encoded only to be encoded again with gradient.
        """
        if self.model.vision is None:
            return [None] * len(prompts)
        errors = self.videos.decode(_videos(prompts))
        found = [next((errors[v] for v in prompt.videos if v in errors), None) for prompt in prompts]
        error = next((error for error in found if error is not None), None)
        if error is not None and not self.skip_bad:
            raise error
        return found

    def rows_for_training(
        self, prompts: Sequence[Prompt], media_rows: Sequence[ShardedRows | None], *, grad: bool
    ) -> list[ShardedRows | None]:
        """Return the media rows of prompts for a pass over their responses.

        Args:
            media_rows: what `rows` gave when the step began: still right while tower and projector are
                frozen.
            grad: whether the pass has a backward pass.
        """
        if not self.encode_again:
            return list(media_rows)
        with self.timers("time/encode"):
            if self.reuse == "none":
                found = [self.videos.encode_or_raise(p.videos, grad=grad, keep=False) for p in prompts]
                return [join_shards(parts) for parts in found]
            distinct = list(dict.fromkeys(_videos(prompts)))
            rows = self.videos.encode_or_raise(distinct, grad=grad, keep=self.reuse == "step")
        by_video = dict(zip(distinct, rows, strict=True))
        return [join_shards([by_video[video] for video in prompt.videos]) for prompt in prompts]

    def _load(
        self, video: SampledVideo, size: tuple[int, int] | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        with self.timers("time/decode"):
            return self.frames.load(video, size, start, stop)

    def report(self, tokens_per_frame: int, work: ModelWork, tally: Tally) -> None:
        """Count what this replica's ranks did since the last report; a collective of its ranks."""
        self.timers.enter("time/decode", "time/encode")  # also in a step whose videos were all there
        before, now = self._reported, self.store.counters
        self._reported, decoded = replace(now), self.frames.misses - self._decoded
        self._decoded = self.frames.misses
        for name in ("hits", "misses", "evicted", "stale"):  # the same on every rank of the replica
            tally.total(f"store/{name}", getattr(now, name) - getattr(before, name))
        own = {
            "frames/decoded": decoded,
            "frames/encoded": now.frames_encoded - before.frames_encoded,
            "frames/from_disk": now.frames_from_disk - before.frames_from_disk,
            "store/corrupt": now.corrupt - before.corrupt,
            "store/bytes": self.store.used_bytes,
        }
        with_grad = now.frames_encoded_with_grad - before.frames_encoded_with_grad
        ranks = gather_objects({**own, "with_grad": with_grad}, self.topology.mrsp_group)
        for name in own:
            tally.total(name, sum(rank[name] for rank in ranks))
        encoded = sum(rank["frames/encoded"] for rank in ranks)
        tally.total("tokens/vision", encoded * tokens_per_frame)
        work.count_frames(encoded, sum(rank["with_grad"] for rank in ranks), tally)


def _videos(prompts: Sequence[Prompt]) -> list[SampledVideo]:
    return [video for prompt in prompts for video in prompt.videos]
