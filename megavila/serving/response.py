"""What the endpoint returns: OpenAI's objects, and counters for Prometheus."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megavila.data import Tokenizer
from megavila.rollout.protocol import Response
from megavila.serving.model import Answer
from megavila.serving.request import ChatRequest


def chat_completion(request: ChatRequest, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """A `chat.completion` object.

    Token counts are the model's own: a video's tokens are in `prompt_tokens`, the end-of-sequence token is in
    `completion_tokens` and, where log-probs are asked for, among `logprobs.content`.
    """
    completion_tokens = sum(len(response.token_ids) for response in answer.choices)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": _content(response, request)},
                "logprobs": _logprobs(response, tokenizer) if request.logprobs else None,
                "finish_reason": response.finish_reason,
            }
            for index, response in enumerate(answer.choices)
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": answer.prompt_tokens + completion_tokens,
        },
    }


def model_list(name: str, context_tokens: int, created: int) -> dict[str, Any]:
    """The `list` object of the one model there is."""
    model = {"id": name, "object": "model", "created": created, "owned_by": "megavila"}
    return {"object": "list", "data": [model | {"max_model_len": context_tokens}]}


@dataclass(frozen=True)
class Metric:
    """One number for Prometheus: a counter where its name ends in "_total", else a gauge. ``labels``: as written."""

    name: str
    text: str
    value: int
    labels: str = ""


def exposition(metrics: Iterable[Metric]) -> str:
    """Prometheus's text format; metrics of one name must follow each other."""
    lines: list[str] = []
    described: set[str] = set()
    for metric in metrics:
        name = f"megavila_{metric.name}"
        if name not in described:
            described.add(name)
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {metric.text}", f"# TYPE {name} {kind}"]
        lines.append(f"{name}{metric.labels} {metric.value}")
    return "\n".join(lines) + "\n"


def _content(response: Response, request: ChatRequest) -> str:
    """The text; without the stop string that ended it, as OpenAI's, unless the request wants to keep it."""
    return response.text if request.keep_stop else cut_stop(response, request.sampling.stop)


def cut_stop(response: Response, stop: Sequence[str]) -> str:
    """A response's text without the stop string at its end; of several that end there, without the longest."""
    ends = [text for text in stop if response.finish_reason == "stop" and response.text.endswith(text)]
    return response.text[: -len(max(ends, key=len))] if ends else response.text


def _logprobs(response: Response, tokenizer: Tokenizer) -> dict[str, Any]:
    content = []
    for token, logprob in zip(response.token_ids.tolist(), response.logprobs.tolist(), strict=True):
        text = tokenizer.decode([token])
        content.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content}
