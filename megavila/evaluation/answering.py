"""A trained model that answers rows: everything that evaluation and offline generation need, built from one config."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavila.config import EvalConfig, MrspConfig
from megavila.data import Prompt, PromptBuilder, PromptTemplate, Row, Tokenizer, read_rows
from megavila.evaluation.loading import open_model
from megavila.media import FrameCache, MediaError, get_decoder
from megavila.models import VisionLanguageModel, tokens_per_frame
from megavila.mrsp.encode import VideoEncoder
from megavila.mrsp.shards import ShardedRows
from megavila.rollout.engines import open_engine
from megavila.rollout.protocol import Response, RolloutEngine, SamplingParams
from megavila.runtime.logging import get_logger
from megavila.runtime.seeds import derive_seed
from megavila.runtime.topology import Topology

GIB = 2**30
_log = get_logger(__name__)


@dataclass(frozen=True)
class Answered:
    """A prompt and the model's responses to it."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class Answerer:
    """A model that is ready to answer; `open_answerer` builds one."""

    config: EvalConfig
    topology: Topology
    tokenizer: Tokenizer
    model: VisionLanguageModel
    engine: RolloutEngine
    encoder: VideoEncoder

    def rows(self) -> list[Row]:
        """All rows of `data.eval`, or the first `limit` of them."""
        rows = [row for path in self.config.data.eval for row in read_rows(path, self.config.data).rows]
        return rows[: self.config.limit]

    def answer(
        self, rows: Sequence[Row], *, num_frames: int | None = None, blank: bool = False, responses: int = 1
    ) -> Iterator[list[Answered | None]]:
        """Responses to rows, a batch at a time and in order; None for a row whose media were skipped by policy.

        Args:
            num_frames: frames sampled from each video, whatever the rows or `data` say; None: as they say.
            blank: show black frames in place of the video's, with the same times and tokens.
            responses: for each row; more than one needs a temperature above 0 to differ.

        Raises MediaError for unreadable media, unless `data.on_bad_media` is "skip".
        """
        builder = self._prompt_builder(num_frames)
        params = SamplingParams(
            max_tokens=self.config.max_response_tokens,
            temperature=self.config.temperature,
            group_size=responses,
        )
        for first in range(0, len(rows), self.config.batch_size):
            batch = rows[first : first + self.config.batch_size]
            ready: dict[int, tuple[Prompt, Tensor | None]] = {}
            for place, row in enumerate(batch):
                try:
                    prompt = builder.build(_with_frames(row, num_frames))
                    ready[place] = prompt, self._media_rows(prompt, blank)
                except MediaError as error:
                    if self.config.data.on_bad_media == "error":
                        raise
                    _log.warning("skipped %s: %s", row.source or row.problem_id, error)
            if not ready:
                yield [None] * len(batch)
                continue
            groups = self.engine.generate(
                [prompt for prompt, _ in ready.values()],
                [media for _, media in ready.values()],
                params,
                [derive_seed(self.config.seed, "answer", batch[place].problem_id) for place in ready],
            )
            found = {
                place: Answered(ready[place][0], group) for place, group in zip(ready, groups, strict=True)
            }
            yield [found.get(place) for place in range(len(batch))]

    def _prompt_builder(self, num_frames: int | None) -> PromptBuilder:
        data, model = self.config.data, self.model.config
        if num_frames is not None:
            data = replace(data, num_frames=num_frames, fps=None)
        assert model.language is not None
        return PromptBuilder(
            self.tokenizer,
            PromptTemplate(data.template),
            data,
            1 if model.vision is None else tokens_per_frame(model.vision, model.projector),
            temporal_pooling=model.projector.temporal_pooling,
            max_prompt_tokens=model.language.max_position_embeddings - self.config.max_response_tokens,
        )

    @torch.no_grad()
    def _media_rows(self, prompt: Prompt, blank: bool) -> Tensor | None:
        if not prompt.videos:
            return None
        if not blank:
            return ShardedRows.join(self.encoder.encode_or_raise(prompt.videos)).whole()
        assert self.model.vision is not None
        size = self.model.vision.config.image_size
        device = self.model.language.output_weight().device
        frame = self.model.encode_frames(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
        return torch.cat(
            [self.model.media_rows(frame.expand(video.num_frames, -1, -1)) for video in prompt.videos]
        )


@contextmanager
def open_answerer(config: EvalConfig, *, frames: FrameCache | None = None) -> Iterator[Answerer]:
    """Join the processes, load the model and yield what answers rows; leave the process groups at the end.

    frames: decoded frames to go on from, where several models in one process look at the same videos.
    """
    with ExitStack() as stack:
        loaded = stack.enter_context(open_model(config))
        model, tokenizer, topology = loaded.model, loaded.tokenizer, loaded.topology
        engine = stack.enter_context(
            open_engine(
                config.engine,
                model,
                tokenizer,
                topology,
                max_tokens=model.language.config.max_position_embeddings,
                max_batch_tokens=config.max_batch_tokens,
                kv_cache_gib=config.kv_cache_gib,
            )
        )
        engine.update_weights()
        frames = frames or FrameCache(
            int(config.data.cache_frames_gib * GIB), get_decoder(config.data.decoder)
        )
        options = MrspConfig(store_gib=config.store_gib)
        yield Answerer(
            config,
            topology,
            tokenizer,
            model,
            engine,
            VideoEncoder.from_config(options, model, frames.load, topology, config.data.decoder),
        )


def _with_frames(row: Row, num_frames: int | None) -> Row:
    """`row` without a frame sampling of its own where the caller sets one."""
    if num_frames is None:
        return row
    own = {key: value for key, value in row.extra.items() if key not in ("num_frames", "fps", "max_frames")}
    return replace(row, extra=own)
