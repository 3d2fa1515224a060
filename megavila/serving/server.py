"""The HTTP of the endpoint: the only file that knows FastAPI and uvicorn."""

import asyncio
import importlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megavila.config import ServeConfig
from megavila.evaluation.responder import open_frames, open_responder
from megavila.media import FrameCache
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger
from megavila.serving.batcher import Batcher
from megavila.serving.errors import ApiError
from megavila.serving.media_root import MediaRoot
from megavila.serving.model import Answer, ChatModel
from megavila.serving.request import ChatRequest, parse_chat_request
from megavila.serving.response import Metric, chat_completion, exposition, model_list

# Questions are short: videos are named, not sent.
MAX_BODY_BYTES = 2**20

_log = get_logger(__name__)


@dataclass
class Service:
    """A model and its queue, and what was asked of them."""

    config: ServeConfig
    model: ChatModel
    frames: FrameCache
    batcher: Batcher[ChatRequest, Answer]
    created: int = field(default_factory=lambda: int(time.time()))
    statuses: Counter[int] = field(default_factory=Counter)
    """Chat requests by the HTTP status they got."""

    def metrics(self) -> list[Metric]:
        """Counts since the server started."""
        store, work = self.model.responder.encoder.store, self.model.work
        requests = [
            Metric("requests_total", "Chat requests by HTTP status.", n, f'{{status="{status}"}}')
            for status, n in sorted(self.statuses.items())
        ]
        return [
            *requests,
            Metric("batches_total", "Batches of requests that were answered together.", self.batcher.batches),
            Metric("videos_total", "Videos that requests asked about, each time they did.", work.videos),
            Metric("store_hits_total", "Videos whose embeddings were in the store.", store.counters.hits),
            Metric("store_misses_total", "Videos whose embeddings were not.", store.counters.misses),
            Metric("frames_decoded_total", "Frames that were decoded.", self.frames.misses),
            Metric(
                "frames_encoded_total",
                "Frames that went through the vision tower.",
                store.counters.frames_encoded,
            ),
            Metric("prompt_tokens_total", "Tokens of prompts, those of videos too.", work.prompt_tokens),
            Metric("completion_tokens_total", "Tokens that were sampled.", work.completion_tokens),
            Metric(
                "prefill_tokens_total", "Prompt tokens that the language model read.", work.prefill_tokens
            ),
            Metric(
                "reused_prompt_tokens_total",
                "Prompt tokens that it did not read again for another choice or request.",
                work.reused_prompt_tokens,
            ),
            Metric("requests_waiting", "Requests in the queue.", self.batcher.waiting),
            Metric("store_videos", "Videos in the store.", len(store)),
        ]


@contextmanager
def open_service(config: ServeConfig) -> Iterator[Service]:
    """Load the model and start its queue; close both at the end.

    Raises MegavilaError where the model cannot be loaded, media_root is no directory or several processes were
    started.
    """
    root, frames = MediaRoot(config.media_root), open_frames(config)
    with open_responder(config, frames=frames) as responder:
        if responder.topology.world_size > 1:
            raise MegavilaError(
                f"serve runs in one process, but {responder.topology.world_size} were started; start one without torchrun"
            )
        model = ChatModel(responder, root)
        batcher = Batcher[ChatRequest, Answer](
            model.answer,
            lambda request: request.sampling,
            max_batch=config.batch_size,
            max_waiting=config.max_waiting,
        )
        try:
            yield Service(config, model, frames, batcher)
        finally:
            batcher.close()


def serve(config: ServeConfig) -> None:
    """Answer requests until SIGINT or SIGTERM; those that are being answered then are answered to the end.

    Raises MegavilaError as `open_service`, and where FastAPI or uvicorn is missing.
    """
    require_http()
    import uvicorn

    with open_service(config) as service:
        app = create_app(service)
        _log.info("serving %s with %s", config.served_name, config.engine)
        # Its access log would be a line a request; errors and the address come through.
        uvicorn.run(app, host=config.host, port=config.port, access_log=False)


def create_app(service: Service) -> Any:
    """The ASGI application. Raises MegavilaError where FastAPI is missing."""
    require_http()
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException

    # No generated pages: they load scripts from elsewhere, and the format is OpenAI's.
    app = FastAPI(title="Megavila", docs_url=None, redoc_url=None, openapi_url=None)

    def failed(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: Any) -> Any:
        return failed(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.get("/health")
    async def health() -> Any:
        status = "failed" if service.model.failure else "ok" if service.batcher.alive else "closing"
        state = {
            "status": status,
            "model": service.config.served_name,
            "engine": service.config.engine,
            "requests_waiting": service.batcher.waiting,
        }
        return JSONResponse(state, status_code=200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse(exposition(service.metrics()))

    @app.get("/v1/models")
    async def models() -> Any:
        return model_list(service.config.served_name, service.model.context_tokens, service.created)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        try:
            body = await _answer(service, request)
        except ApiError as error:
            service.statuses[error.status] += 1
            return failed(error)
        except Exception:
            _log.exception("a request failed")
            service.statuses[500] += 1
            return failed(
                ApiError(500, "the server failed on this request; its log says why", code="internal_error")
            )
        service.statuses[200] += 1
        return body

    return app


async def _answer(service: Service, request: Any) -> dict[str, Any]:
    """The `chat.completion` of one HTTP request. Raises ApiError."""
    asked = parse_chat_request(await _json(request), temperature=service.config.temperature)
    name = service.config.served_name
    if asked.model != name:
        raise ApiError(
            404,
            f"model {asked.model!r} is not served here; the one that is: {name!r}",
            param="model",
            code="model_not_found",
        )
    answer = await asyncio.wrap_future(service.batcher.submit(asked))
    return chat_completion(asked, answer, service.model.responder.tokenizer)


async def _json(request: Any) -> object:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(
                413, f"the body is larger than {MAX_BODY_BYTES} bytes; name videos, do not send them"
            )
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def require_http() -> None:
    """Raises MegavilaError naming the extra to install where FastAPI or uvicorn is missing."""
    for name in ("fastapi", "uvicorn"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MegavilaError(
                f"megavila serve needs {name}, which cannot be imported ({error}); install it with "
                'pip install "megavila[serve]"'
            ) from error
