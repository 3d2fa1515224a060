"""Chat requests into prompts, prompts into answers: the endpoint without its HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megavila.data import Prompt, PromptTooLong, Row
from megavila.data.options import split_options
from megavila.data.row import MULTIPLE_CHOICE, OPEN_ENDED
from megavila.evaluation.responder import Responder
from megavila.media import MediaError
from megavila.rollout.protocol import Response, SamplingParams
from megavila.rollout.recovery import EngineFailed, EngineGone
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger
from megavila.runtime.seeds import derive_seed
from megavila.serving.errors import ApiError
from megavila.serving.media_root import MediaRoot
from megavila.serving.request import ChatRequest

_log = get_logger(__name__)


@dataclass(frozen=True)
class Answer:
    """A prompt's tokens and the choices that were drawn for it."""

    prompt_tokens: int
    choices: tuple[Response, ...]


@dataclass(frozen=True, eq=False)
class _Ready:
    """A request whose prompt is built and whose videos are encoded."""

    prompt: Prompt
    media_rows: Tensor | None
    params: SamplingParams
    seed: int


@dataclass
class Work:
    """What the model has done since the server started."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_tokens: int = 0
    reused_prompt_tokens: int = 0
    videos: int = 0
    """Videos that requests asked about, each time they did."""


@dataclass
class ChatModel:
    """A model that answers chat requests, a batch at a time, always from the same thread.

    A question becomes a row, as `megavila generate` reads it from a file: the same template, the same sampling of
    frames, the same store of encoded videos.
    """

    responder: Responder
    root: MediaRoot
    work: Work = field(default_factory=Work)
    failure: str | None = None
    """Why no request is answered any more."""

    def __post_init__(self) -> None:
        self.context_tokens = self.responder.context_tokens
        self._builder = self.responder.prompt_builder(self.context_tokens - 1)

    def answer(self, requests: Sequence[ChatRequest]) -> list[Answer | Exception]:
        """One answer for each request, or why it has none: ApiError for what the client can mend."""
        results: dict[int, Answer | Exception] = {}
        ready: dict[int, _Ready] = {}
        for place, request in enumerate(requests):
            try:
                ready[place] = self._prepare(request)
            except Exception as error:
                results[place] = _for_client(error)
        # Prompts near the end of the context have shorter answers than others by default.
        for params in dict.fromkeys(item.params for item in ready.values()):
            places = [place for place, item in ready.items() if item.params == params]
            answers = self._generate([ready[place] for place in places], params)
            results |= dict(zip(places, answers, strict=True))
        return [results[place] for place in range(len(requests))]

    def _prepare(self, request: ChatRequest) -> _Ready:
        files = [self.root.find(url) for url in request.videos]
        row = Row(
            problem_id="request",
            problem=request.text,
            data_type="video" if files else "text",
            problem_type=MULTIPLE_CHOICE if split_options(request.text)[1] else OPEN_ENDED,
            videos=tuple(files),
            extra=dict(request.columns),
        )
        try:
            prompt = self._builder.build(row)
            params = self._params(request, len(prompt.token_ids))
            rows = self.responder.media_rows(prompt)
        except MediaError as error:
            url = dict(zip(files, request.videos, strict=True)).get(error.path, "")
            raise ApiError(
                400, f"video {url!r}: {error.reason}", param="messages", code="video_unreadable"
            ) from error
        except PromptTooLong as error:
            raise _too_long(str(error)) from error
        self.work.videos += len(files)
        seed = secrets.randbits(63) if request.seed is None else derive_seed("serve", request.seed)
        return _Ready(prompt, rows, params, seed)

    def _params(self, request: ChatRequest, prompt_tokens: int) -> SamplingParams:
        sampling, room = request.sampling, self.context_tokens - prompt_tokens
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise _too_long(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {sampling.max_tokens}, together more than the "
                f"model's context of {self.context_tokens}; set max_tokens to at most {room}"
            )
        return SamplingParams(
            max_tokens=sampling.max_tokens or min(self.responder.config.max_response_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=sampling.stop,
            group_size=sampling.n,
        )

    def _generate(self, batch: Sequence[_Ready], params: SamplingParams) -> list[Answer | Exception]:
        engine = self.responder.engine
        try:
            groups = engine.generate(
                [item.prompt for item in batch],
                [item.media_rows for item in batch],
                params,
                [item.seed for item in batch],
            )
        except EngineGone as error:
            self.failure = str(error)
            _log.error("no request is answered any more: %s", error)
            return [
                ApiError(503, "the engine has failed; start the server again", code="engine_failed")
            ] * len(batch)
        except Exception as error:
            if len(batch) > 1:  # one of them may be to blame, the others shall not suffer
                _log.warning("a batch of %d failed and is tried one by one: %s", len(batch), error)
                return [answer for item in batch for answer in self._generate([item], params)]
            return [_for_client(error)]
        counts = engine.take_counts()
        self.work.prefill_tokens += counts.prefill_tokens
        self.work.reused_prompt_tokens += counts.reused_prompt_tokens
        answers: list[Answer | Exception] = []
        for item, group in zip(batch, groups, strict=True):
            self.work.prompt_tokens += len(item.prompt.token_ids)
            self.work.completion_tokens += sum(len(response.token_ids) for response in group)
            answers.append(Answer(len(item.prompt.token_ids), group))
        return answers


def _too_long(message: str) -> ApiError:
    return ApiError(413, message, param="messages", code="context_length_exceeded")


def _for_client(error: Exception) -> Exception:
    """A user's mistake as a 400; what is not the user's as it is, with its traceback in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MegavilaError) and not isinstance(error, EngineFailed):
        return ApiError(400, str(error))
    _log.error("a request failed", exc_info=error)
    return error
