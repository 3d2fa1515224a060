"""`megavila generate`: a checkpoint's responses to rows, offline."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megavila.cli.settings import ConfigFile, Data, Model, Overrides, load_settings
from megavila.config import EvalConfig
from megavila.data import Row
from megavila.evaluation.answering import Answered, open_answerer
from megavila.runtime.errors import MegavilaError
from megavila.runtime.progress import Progress


def generate(
    out: Annotated[Path, typer.Option(help="JSON Lines file to write: one object a row with its responses.")],
    overrides: Overrides = None,
    model: Model = None,
    data: Data = None,
    config: ConfigFile = None,
    responses: Annotated[int, typer.Option("-n", "--responses", help="Responses to each row.")] = 1,
) -> None:
    """Responses of a checkpoint to rows, with the log-probability of every token sampled.

    The answers in the rows are not used. Example:
    megavila generate --model runs/demo/grpo/hf --data rows.jsonl --out out.jsonl -n 4 temperature=1
    """
    settings = load_settings(EvalConfig, config, model, data, overrides)
    if responses > 1 and settings.temperature == 0:
        raise MegavilaError(
            f"{responses} greedy responses would all be equal; set temperature above 0, such as temperature=1"
        )
    if out.exists():
        raise MegavilaError(f"{out} exists already; name a new file")
    with open_answerer(settings) as answerer:
        topology, rows = answerer.topology, answerer.rows()
        if topology.data > 1:
            raise MegavilaError(
                f"generate runs on one model replica, but {topology.data} were started; start "
                f"{topology.world_size // topology.data} processes"
            )
        records: list[str] = []
        with Progress("generating", len(rows), enabled=topology.is_main) as bar:
            for batch in answerer.answer(rows, responses=responses):
                for answered in batch:
                    records.append(json.dumps(_record(rows[len(records)], answered)))
                bar.advance(len(batch))
        if topology.is_main:
            partial = out.with_name(out.name + ".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(f"{record}\n" for record in records))
            partial.replace(out)


def _record(row: Row, answered: Answered | None) -> dict[str, object]:
    """`responses` is null where the row's media could not be read and data.on_bad_media is "skip"."""
    if answered is None:
        return {"problem_id": row.problem_id, "responses": None}
    responses = [
        {
            "text": response.text,
            "token_ids": response.token_ids.tolist(),
            "logprobs": response.logprobs.tolist(),
            "finish_reason": response.finish_reason,
        }
        for response in answered.responses
    ]
    return {"problem_id": row.problem_id, "responses": responses}
