"""What the subcommands that load a model share: --model, --data and key=value settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from megavila.config import EvalConfig, ScoreConfig, ServeConfig, load_config

C = TypeVar("C", EvalConfig, ScoreConfig, ServeConfig)

Model = Annotated[
    Path | None,
    typer.Option(help="Checkpoint directory, such as runs/<name>/hf; the same as model.path=DIR."),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="File of rows, JSON Lines or parquet; may be repeated. The same as data.eval."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings; they win over the file's.")
]


def load_settings(
    root: type[C],
    config: Path | None,
    model: Path | None,
    data: Sequence[Path] | None,
    overrides: Sequence[str] | None,
) -> C:
    """The resolved settings of a subcommand. Raises ConfigError as `load_config` does."""
    settings = [*(overrides or ())]
    if model is not None:
        settings.append(f"model.path={model}")
    if data:
        settings.append(f"data.eval=[{','.join(str(path) for path in data)}]")
    return load_config(root, config, settings)
