"""A chat request: what of OpenAI's format the endpoint takes, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megavila.config.data import MAX_FRAMES
from megavila.serving.errors import ApiError, invalid

# OpenAI's own limits.
MAX_CHOICES = 128
MAX_TEMPERATURE = 2.0
MAX_STOPS = 4
# Below it logits divided by the temperature overflow, and 0 means greedy anyway.
MIN_TEMPERATURE = 0.01

# More times a second than any camera takes pictures; the list of times to look at grows with it.
MIN_FPS, MAX_FPS = 1e-6, 1000.0
MAX_SECONDS = 1e9

# A row's columns of the same names: how this request's videos are sampled (see PromptBuilder).
COLUMNS = ("num_frames", "fps", "max_frames", "start", "end")
# Fields of OpenAI's that change nothing at the values which clients send by default; no other value is taken.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "stream": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
}
WHY_NOT = {
    "stream": "answers come whole; leave it out or set it to false",
    "top_logprobs": "log-probs are those of the sampled tokens alone; leave it out or set it to 0",
}
IGNORED = ("user", "metadata")  # labels for OpenAI's own books
FIELDS = (
    "model",
    "messages",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "seed",
    "stop",
    "include_stop_str_in_output",
    "logprobs",
    *COLUMNS,
    *NEUTRAL,
    *IGNORED,
)


@dataclass(frozen=True)
class Sampling:
    """How a request's choices are drawn; requests that are alike in it are answered together.

    `max_tokens` None: as many as the server's default and the model's context allow.
    """

    temperature: float
    top_p: float = 1.0
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """One question.

    Attributes:
        model: what the client calls the model.
        text: of all the message's text parts, one a line.
        videos: urls as the client wrote them, in order.
        sampling: how the choices are drawn.
        seed: None: another one for each request.
        logprobs: whether to tell the log-probability of every sampled token.
        keep_stop: whether the text keeps the stop string that ended it.
        columns: of the row that the question becomes.
    """

    model: str
    text: str
    videos: tuple[str, ...]
    sampling: Sampling
    seed: int | None = None
    logprobs: bool = False
    keep_stop: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)


def parse_chat_request(body: object, *, temperature: float) -> ChatRequest:
    """Check the JSON of a request.

    Args:
        body: as `json.loads` gives it.
        temperature: of a request that names none.

    Raises:
        ApiError: 400, naming the field, its value and what it may be.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {_kind(body)}, not a JSON object")
    for name in body:
        if name not in FIELDS:
            raise ApiError(
                400, f"{name!r} is no field of this endpoint; it takes {', '.join(FIELDS)}", param=name
            )
    given = {name: value for name, value in body.items() if value is not None}
    for name, values in NEUTRAL.items():
        if name in given and given[name] not in values:
            raise invalid(name, f"{given[name]!r} is not supported; {WHY_NOT.get(name, 'leave it out')}")
    fields = _Fields(given)
    text, videos = _question(fields.required("messages"))
    return ChatRequest(
        model=fields.text("model"),
        text=text,
        videos=videos,
        sampling=Sampling(
            temperature=_temperature(fields, temperature),
            top_p=_top_p(fields),
            max_tokens=_max_tokens(fields),
            n=fields.whole("n", 1, 1, MAX_CHOICES),
            stop=_stop(given.get("stop", [])),
        ),
        seed=fields.whole("seed", None, -(2**63), 2**64 - 1),
        logprobs=fields.flag("logprobs"),
        keep_stop=fields.flag("include_stop_str_in_output"),
        columns=_columns(fields),
    )


def _question(messages: object) -> tuple[str, tuple[str, ...]]:
    """Text and video urls of the one message."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise invalid("messages", "must be a list of objects with role and content")
    roles = [message.get("role") for message in messages]
    if roles != ["user"]:
        raise invalid(
            "messages",
            f"has the roles {roles}; give one message, of the user: the prompt template, which the model was trained "
            "with, writes all else around it",
        )
    content = messages[0].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise invalid("messages[0].content", f"is {_kind(content)}; give a text or a list of parts")
    texts, videos = [], []
    for place, part in enumerate(parts):
        where = f"messages[0].content[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_sound_text(part.get("text"), f"{where}.text"))
        elif kind == "video_url":
            url = part.get("video_url")
            url = url.get("url") if isinstance(url, dict) else url
            videos.append(_sound_text(url, f"{where}.video_url.url"))
        else:
            raise invalid(where, f"has type {kind!r}; parts are of type 'text' or 'video_url'")
    text = "\n".join(texts)
    if not text.strip():
        raise invalid("messages[0].content", "has no text; ask something")
    return text, tuple(videos)


def _temperature(fields: _Fields, default: float) -> float:
    value = fields.number("temperature", default, 0, MAX_TEMPERATURE)
    if 0 < value < MIN_TEMPERATURE:
        raise invalid("temperature", f"is {value}; use 0 (greedy) or at least {MIN_TEMPERATURE}")
    return value


def _top_p(fields: _Fields) -> float:
    value = fields.number("top_p", 1.0, 0, 1)
    if value == 0:
        raise invalid("top_p", "is 0, must be greater; for greedy decoding set temperature to 0")
    return value


def _max_tokens(fields: _Fields) -> int | None:
    """Of `max_tokens` and its newer name."""
    found = {
        fields.whole(name, None, 1, 2**31 - 1)
        for name in ("max_tokens", "max_completion_tokens")
        if name in fields.given
    }
    if len(found) > 1:
        raise invalid("max_tokens", "differs from max_completion_tokens, its newer name; give one of them")
    return next(iter(found), None)


def _columns(fields: _Fields) -> dict[str, Any]:
    """Those that are given; what contradicts itself, such as num_frames beside fps, the prompt builder refuses."""
    found: dict[str, Any] = {}
    for name in ("num_frames", "max_frames"):
        found[name] = fields.whole(name, None, 1, MAX_FRAMES)
    for name, low, high in (("fps", MIN_FPS, MAX_FPS), ("start", 0, MAX_SECONDS), ("end", 0, MAX_SECONDS)):
        found[name] = fields.number(name, None, low, high)
    return {name: value for name, value in found.items() if value is not None}


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise invalid("stop", f"must be a text or a list of at most {MAX_STOPS}")
    texts = [_sound_text(stop, "stop") for stop in stops]
    if not all(texts):
        raise invalid("stop", "holds an empty text, which would end every answer at once")
    return tuple(texts)


def _sound_text(value: object, name: str) -> str:
    """A text that can be written as UTF-8; JSON also knows halves of characters."""
    if not isinstance(value, str):
        raise invalid(name, f"is {_kind(value)}, must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(name, f"is not Unicode text: half a character at {error.start}") from None
    return value


def _kind(value: object) -> str:
    return {"NoneType": "missing", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, type(value).__name__
    )


@dataclass(frozen=True)
class _Fields:
    """The fields that are not null."""

    given: Mapping[str, Any]

    def required(self, name: str) -> Any:
        if name not in self.given:
            raise invalid(name, "is missing")
        return self.given[name]

    def text(self, name: str) -> str:
        return _sound_text(self.required(name), name)

    def flag(self, name: str) -> bool:
        value = self.given.get(name, False)
        if not isinstance(value, bool):
            raise invalid(name, f"is {value!r}, must be true or false")
        return value

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        """A float, or ``default`` where there is none."""
        if name not in self.given:
            return default
        value = self.given[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(name, f"is {value!r}, must be a number")
        if not low <= value <= high:
            raise invalid(name, f"is {value}, must be from {low} to {high}")
        return float(value)

    def whole(self, name: str, default: Any, low: int, high: int) -> Any:
        """An int, or ``default`` where there is none."""
        if name not in self.given:
            return default
        value = self.given[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(name, f"is {value!r}, must be a whole number")
        if not low <= value <= high:
            raise invalid(name, f"is {value}, must be from {low} to {high}")
        return value
