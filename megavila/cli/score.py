"""`megavila score`: log-probabilities of given responses."""

from pathlib import Path
from typing import Annotated

import typer

from megavila.cli.settings import ConfigFile, Data, Model, Overrides, load_settings
from megavila.config import ScoreConfig
from megavila.evaluation.scoring import score_file


def score(
    out: Annotated[Path, typer.Option(help="JSON Lines file to write: one object a row with its responses.")],
    overrides: Overrides = None,
    model: Model = None,
    data: Data = None,
    config: ConfigFile = None,
) -> None:
    """Token ids, log-probabilities and their sum for each response in the column `responses` of the rows.

    A response is a text, after which an end-of-sequence token is scored too, or a list of token ids, which is scored
    as it is. A video and its prompt are read once for all responses of a row. Example:
    torchrun --nproc-per-node 2 -m megavila score --model runs/demo/grpo/hf --data rows.jsonl --out scores.jsonl
    parallel.tensor_parallel=2 mrsp.layout=shared_prefix
    """
    score_file(load_settings(ScoreConfig, config, model, data, overrides), out)
