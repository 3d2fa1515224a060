"""`megavila serve`: a checkpoint behind an OpenAI-compatible endpoint."""

from pathlib import Path
from typing import Annotated

import typer

from megavila.cli.settings import ConfigFile, Model, Overrides, load_settings
from megavila.config import ServeConfig
from megavila.serving.server import serve


def serve_command(
    overrides: Overrides = None,
    model: Model = None,
    config: ConfigFile = None,
    media_root: Annotated[
        Path | None,
        typer.Option(help="Directory whose videos requests may name; the same as media_root=DIR."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; the same as name=NAME.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; the same as host=ADDRESS.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; the same as port=N.")] = None,
) -> None:
    """Answer questions about videos over HTTP, in OpenAI's format: POST /v1/chat/completions.

    A video is a part {"type": "video_url", "video_url": {"url": "clip.mp4"}} that names a file under --media-root; it
    is decoded and encoded once, however often it is asked about. GET /health, /metrics and /v1/models tell the rest.
    Example: megavila serve --model runs/demo/grpo/hf --media-root runs/demo/data/videos engine=vllm
    """
    given = {"media_root": media_root, "name": name, "host": host, "port": port}
    settings = [f"{key}={value}" for key, value in given.items() if value is not None]
    serve(load_settings(ServeConfig, config, model, None, [*(overrides or ()), *settings]))
