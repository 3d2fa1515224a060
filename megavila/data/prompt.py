"""The canonical multimodal prompt: the one source of token ids, positions and media rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megavila.config import DataConfig
from megavila.data.frame_text import FrameText
from megavila.data.row import Row
from megavila.data.template import Part, PromptTemplate
from megavila.data.tokenizer import MEDIA_TOKEN, Tokenizer
from megavila.media import SampledVideo, sample_video
from megavila.runtime.errors import MegavilaError

# Names that tokenizers in use have for "a row of media goes here", the most particular first.
_MEDIA_TOKENS = (MEDIA_TOKEN, "<vila/video>", "<|video_pad|>", "<|image_pad|>", "<image>")

_REMEMBERED_TEXTS = 8192


class PromptTooLong(MegavilaError):
    """A prompt has more tokens than the model or the run has room for; the message names both."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What both rollout and trainer read for one row.

    Attributes:
        token_ids: int64 (P,); media positions hold the media token's id.
        position_ids: int64 (P,) or (3, P).
        media_index: int64 (P,), row of this prompt's concatenated media rows, or -1 for text.
        videos: in the order in which their rows are concatenated.
        tokens_per_frame: rows of one frame (of one group of frames, with temporal pooling).
        next_position: position of a response's first token.
        row: where it comes from.
        fingerprint: identity of tokens, positions and media.
    """

    token_ids: Tensor
    position_ids: Tensor
    media_index: Tensor
    videos: tuple[SampledVideo, ...]
    tokens_per_frame: int
    next_position: int
    row: Row
    fingerprint: str

    @property
    def num_media_rows(self) -> int:
        return int((self.media_index >= 0).sum())


@dataclass(frozen=True)
class MediaSpan:
    """Tokens [start, start + tokens) of a prompt that hold one frame, or one group of pooled frames."""

    start: int
    tokens: int
    video: int
    group: int  # number of the frame group in its video
    time: float  # seconds of its first frame


PositionRule = Callable[[int, Sequence[MediaSpan]], tuple[Tensor, int]]
"""(prompt tokens P, media spans) -> position ids (P,) or (3, P), and the position of the first response token."""


def sequential_positions(num_tokens: int, spans: Sequence[MediaSpan]) -> tuple[Tensor, int]:
    """One position a token, media or text: the rule of VILA and every other model with 1-D rotary embeddings."""
    del spans
    return torch.arange(num_tokens), num_tokens


class PromptBuilder:
    """Makes prompts from rows; the only place that decides on token ids and positions.

    Args:
        tokenizer, template, config: how text is written; `config` also says how videos are sampled. A row's own
            columns `num_frames`, or `fps` and `max_frames`, come before those of `config`; its columns `start` and
            `end` (seconds) make it a row about that clip of its video, and `time_offset` (seconds) is added to the
            times that its frames are labelled with.
        tokens_per_frame: rows of the language model one frame becomes.
        temporal_pooling: consecutive frames that share these rows (the last group of a video may be smaller).
        max_prompt_tokens: longer prompts are an error.
        media_token: what media positions hold; by default the tokenizer's own media token, else its padding.
        positions: the rule for position ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        config: DataConfig,
        tokens_per_frame: int,
        *,
        temporal_pooling: int = 1,
        max_prompt_tokens: int | None = None,
        media_token: str | None = None,
        positions: PositionRule = sequential_positions,
    ) -> None:
        if tokens_per_frame < 1 or temporal_pooling < 1:
            raise ValueError(
                f"tokens_per_frame={tokens_per_frame}, temporal_pooling={temporal_pooling}: at least 1"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.config = config
        self.tokens_per_frame = tokens_per_frame
        self.temporal_pooling = temporal_pooling
        self.max_prompt_tokens = max_prompt_tokens
        self.media_token_id = _media_token_id(tokenizer, media_token)
        self._positions = positions
        self._frame_text = FrameText(config.frame_template)
        # Texts between frames recur: in a prompt where frames are not timed, in all prompts where they are.
        self._encode = lru_cache(maxsize=_REMEMBERED_TEXTS)(tokenizer.encode)

    def build(self, row: Row) -> Prompt:
        """The prompt of one row. Raises MediaError for an unreadable video, PromptTooLong."""
        if row.data_type == "audio":
            raise MegavilaError(
                f"{row.source or row.problem_id}: audio rows cannot be made into prompts; leave them out"
            )
        videos = tuple(sample_video(path, **self._sampling(row)) for path in row.videos)
        parts = self.template.render(row, videos[0].duration if videos else None)
        ids, spans = self._tokens(parts, videos, float(row.extra.get("time_offset") or 0))
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise PromptTooLong(self._too_long(row, videos, len(ids), spans))
        token_ids = torch.tensor(ids, dtype=torch.int64)
        # Rows are concatenated by video in the row's order, whatever order a template shows the videos in.
        groups = [-(-video.num_frames // self.temporal_pooling) for video in videos]
        before = [0, *accumulate(groups)]
        starts = torch.tensor([span.start for span in spans], dtype=torch.int64)
        numbers = torch.tensor([before[span.video] + span.group for span in spans], dtype=torch.int64)
        place = torch.arange(self.tokens_per_frame)
        media_index = torch.full((len(ids),), -1, dtype=torch.int64)
        media_index[starts[:, None] + place] = numbers[:, None] * self.tokens_per_frame + place
        position_ids, next_position = self._positions(len(ids), spans)
        return Prompt(
            token_ids=token_ids,
            position_ids=position_ids,
            media_index=media_index,
            videos=videos,
            tokens_per_frame=self.tokens_per_frame,
            next_position=next_position,
            row=row,
            fingerprint=_fingerprint((token_ids, position_ids, media_index), videos),
        )

    def encode_response(self, text: str) -> Tensor:
        """int64 (R,) token ids of a response, the end-of-sequence token included."""
        return torch.tensor([*self.tokenizer.encode_literal(text), self.tokenizer.eos_id], dtype=torch.int64)

    def _sampling(self, row: Row) -> dict[str, Any]:
        own = {
            key: row.extra[key]
            for key in ("num_frames", "fps", "max_frames", "start", "end")
            if row.extra.get(key) is not None
        }
        for key, value in own.items():
            whole = key in ("num_frames", "max_frames")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise MegavilaError(
                    f"{row.source}: field {key!r}: {value!r} is not a number of the right kind"
                )
        config = self.config
        if "num_frames" not in own and "fps" not in own:
            own = {"num_frames": config.num_frames, "fps": config.fps} | own
        if own.get("fps") is not None:
            own.setdefault("max_frames", config.max_frames)
        return own

    def _tokens(
        self, parts: Sequence[Part], videos: Sequence[SampledVideo], time_offset: float
    ) -> tuple[list[int], list[MediaSpan]]:
        ids = list(self.tokenizer.prefix_ids)
        spans: list[MediaSpan] = []
        text = ""  # neighbouring texts are tokenized together, as a tokenizer would see the whole prompt

        def flush() -> None:
            nonlocal text
            if text:
                ids.extend(self._encode(text))
                text = ""

        for part in parts:
            if part.kind == "template" or (part.kind == "row" and not self.tokenizer.has_special(part.text)):
                text += part.text
            elif part.kind == "row":
                flush()
                ids.extend(self.tokenizer.encode_literal(part.text))
            else:
                for group, time in enumerate(videos[part.video].timestamps[:: self.temporal_pooling]):
                    before, after = self._frame_text.around(time + time_offset)
                    text += before
                    flush()
                    spans.append(MediaSpan(len(ids), self.tokens_per_frame, part.video, group, time))
                    ids.extend([self.media_token_id] * self.tokens_per_frame)
                    text += after
        flush()
        return ids, spans

    def _too_long(
        self, row: Row, videos: Sequence[SampledVideo], tokens: int, spans: Sequence[MediaSpan]
    ) -> str:
        media = sum(span.tokens for span in spans)
        frames = sum(video.num_frames for video in videos)
        assert self.max_prompt_tokens is not None
        spare = self.max_prompt_tokens - (tokens - media)
        fit = max(0, int(frames * spare / media)) if media else 0
        fix = f"use at most about {fit} frames" if fit else "raise the limit"
        return (
            f"{row.source or row.problem_id}: its prompt has {tokens} tokens ({media} for {frames} frames), more than "
            f"max_prompt_tokens={self.max_prompt_tokens}; {fix}"
        )


def _media_token_id(tokenizer: Tokenizer, media_token: str | None) -> int:
    if media_token is not None:
        token_id = tokenizer.token_id(media_token)
        if token_id is None:
            raise MegavilaError(f"media token {media_token!r} is not in the tokenizer's vocabulary")
        return token_id
    return next((i for t in _MEDIA_TOKENS if (i := tokenizer.token_id(t)) is not None), tokenizer.pad_id)


def _fingerprint(tensors: Iterable[Tensor], videos: Iterable[SampledVideo]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    for video in videos:
        digest.update(repr((video.fingerprint, video.frame_ids)).encode())
    return digest.hexdigest()
