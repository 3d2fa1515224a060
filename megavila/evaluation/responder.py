"""A trained model with an engine and a video encoder: what evaluation, offline generation and the server share."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavila.config import AnswerConfig, MrspConfig
from megavila.data import Prompt, PromptBuilder, PromptTemplate, Tokenizer
from megavila.evaluation.loading import open_model
from megavila.media import FrameCache, get_decoder
from megavila.models import VisionLanguageModel, tokens_per_frame
from megavila.mrsp.encode import VideoEncoder
from megavila.mrsp.shards import ShardedRows
from megavila.rollout.engines import open_engine
from megavila.rollout.protocol import RolloutEngine
from megavila.runtime.topology import Topology

GIB = 2**30


@dataclass(frozen=True)
class Responder:
    """A model that is ready to respond to prompts; `open_responder` builds one."""

    config: AnswerConfig
    topology: Topology
    tokenizer: Tokenizer
    model: VisionLanguageModel
    engine: RolloutEngine
    encoder: VideoEncoder

    @property
    def context_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.model.language.config.max_position_embeddings

    def prompt_builder(self, max_prompt_tokens: int, num_frames: int | None = None) -> PromptBuilder:
        """What makes the model's prompts.

        Args:
            max_prompt_tokens: longer prompts are an error.
            num_frames: sampled uniformly from each video in place of what `data` says.
        """
        data, model = self.config.data, self.model.config
        if num_frames is not None:
            data = replace(data, num_frames=num_frames, fps=None)
        return PromptBuilder(
            self.tokenizer,
            PromptTemplate(data.template),
            data,
            1 if model.vision is None else tokens_per_frame(model.vision, model.projector),
            temporal_pooling=model.projector.temporal_pooling,
            max_prompt_tokens=max_prompt_tokens,
        )

    @torch.no_grad()
    def media_rows(self, prompt: Prompt, *, blank: bool = False) -> Tensor | None:
        """(num_media_rows, hidden) of the prompt's videos, from the store where it has them; None without videos.

        blank: those of black frames in place of the videos'. Raises MediaError for a video that cannot be decoded.
        """
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
def open_responder(config: AnswerConfig, *, frames: FrameCache | None = None) -> Iterator[Responder]:
    """Join the processes, load the model, yield it with its engine; leave the process groups at the end.

    frames: decoded frames to go on from, where several models in one process look at the same videos.
    """
    with ExitStack() as stack:
        loaded = stack.enter_context(open_model(config))
        model, tokenizer, topology = loaded.model, loaded.tokenizer, loaded.topology
        engine = stack.enter_context(
            open_engine(
                config,
                model,
                tokenizer,
                topology,
                max_tokens=model.language.config.max_position_embeddings,
            )
        )
        engine.update_weights()
        frames = frames or open_frames(config)
        options = MrspConfig(store_gib=config.store_gib)
        encoder = VideoEncoder.from_config(options, model, frames.load, topology, config.data.decoder)
        yield Responder(config, topology, tokenizer, model, engine, encoder)


def open_frames(config: AnswerConfig) -> FrameCache:
    """An empty cache of decoded frames, as large as `config` says."""
    return FrameCache(int(config.data.cache_frames_gib * GIB), get_decoder(config.data.decoder))
