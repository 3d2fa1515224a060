"""Reading rows from JSON Lines and parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavila.config import DataConfig
from megavila.data.options import choice_letter, split_options
from megavila.data.row import MULTIPLE_CHOICE, OPEN_ENDED, Row, strip_answer_tags
from megavila.runtime.errors import MegavilaError
from megavila.runtime.logging import get_logger

_log = get_logger(__name__)

DATA_TYPES = ("video", "image", "text", "audio")


class RowError(MegavilaError):
    """A malformed row or file of rows; the message names file, line and field."""


@dataclass(frozen=True)
class RowFile:
    """Rows in the order of the file.

    Attributes:
        rows: the sound ones.
        skipped: how many were left out; more than 0 only with data.on_bad_row=skip.
        reasons: why, one message for each of them.
    """

    rows: list[Row]
    skipped: int = 0
    reasons: tuple[str, ...] = ()


def read_rows(path: str | os.PathLike[str], config: DataConfig) -> RowFile:
    """Read a `.jsonl` or `.parquet` file with the column names of `config`.

    Raises RowError for an unreadable file and, unless `config.on_bad_row` is "skip", for the first malformed row.
    """
    file = Path(path)
    if not file.is_file():
        raise RowError(f"{file}: no such file of rows")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix.lower() not in readers:
        raise RowError(
            f"{file}: rows must be in a file ending in {' or '.join(readers)}, not {file.suffix!r}"
        )
    rows: list[Row] = []
    reasons: list[str] = []
    for line, record in readers[file.suffix.lower()](file):
        source = f"{file}:{line}"
        try:
            if isinstance(record, RowError):
                raise record
            rows.append(parse_row(record, config, source=source, folder=file.parent))
        except RowError as error:
            if config.on_bad_row == "error":
                raise
            reasons.append(str(error))
    if reasons:
        _log.warning("%s: skipped %d malformed rows, the first: %s", file, len(reasons), reasons[0])
    return RowFile(rows, len(reasons), tuple(reasons))


def _read_jsonl(file: Path) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                record = json.loads(text)
            except ValueError as error:
                yield number, RowError(f"{file}:{number}: not a line of JSON: {error}")
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                yield (
                    number,
                    RowError(f"{file}:{number}: a row must be a JSON object, not {type(record).__name__}"),
                )


def _read_parquet(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError) as error:
        raise RowError(f"{file}: not a readable parquet file: {error}") from error


def parse_row(record: Mapping[str, Any], config: DataConfig, *, source: str, folder: Path) -> Row:
    """Check one record and make it a Row. Relative media paths start at `config.media_dir` or `folder`."""
    fields = _Fields(record, source)
    problem = fields.text(config.prompt_key)
    videos = fields.paths(config.video_key, Path(config.media_dir) if config.media_dir else folder)
    data_type = fields.text(config.data_type_key, default="video" if videos else "text").lower()
    if data_type not in DATA_TYPES:
        raise fields.error(config.data_type_key, f"{data_type!r} is not one of {', '.join(DATA_TYPES)}")
    if bool(videos) != (data_type != "text"):
        wanted = "none" if data_type == "text" else "at least one path"
        raise fields.error(
            config.video_key, f"{list(videos)!r}: {config.data_type_key}={data_type!r} needs {wanted}"
        )
    problem = _with_options(problem, fields)
    answer = strip_answer_tags(fields.text(config.answer_key))
    if not answer:
        raise fields.error(config.answer_key, "is empty")
    options = split_options(problem)[1]
    default_type = MULTIPLE_CHOICE if options and choice_letter(answer) else OPEN_ENDED
    problem_type = _normal_type(fields.text(config.problem_type_key, default=default_type))
    if problem_type == MULTIPLE_CHOICE:
        letters = "".join(option.letter for option in options)
        if not letters:
            raise fields.error(
                config.prompt_key, f"a {MULTIPLE_CHOICE} problem has no options like 'A: …' in it"
            )
        letter = choice_letter(answer, letters)
        if letter is None:
            raise fields.error(
                config.answer_key, f"{answer!r} is not one of its options {', '.join(letters)}"
            )
        answer = letter
    known = (
        config.id_key,
        config.prompt_key,
        config.answer_key,
        config.video_key,
        config.reasoning_key,
        config.data_type_key,
        config.problem_type_key,
        config.category_key,
    )
    return Row(
        problem_id=fields.text(config.id_key, default=source),
        problem=problem,
        data_type=data_type,
        problem_type=problem_type,
        reasoning=fields.text(config.reasoning_key, default=""),
        videos=videos,
        answer=answer,
        category=fields.text(config.category_key, default=""),
        extra={key: value for key, value in record.items() if key not in known},
        source=source,
    )


def _normal_type(problem_type: str) -> str:
    """One spelling for the names in use: "Multiple-choice", "multiple_choice" and "mcq" are one type."""
    name = " ".join(problem_type.lower().replace("_", " ").replace("-", " ").split())
    if name in ("multiple choice", "mcq", "multi choice"):
        return MULTIPLE_CHOICE
    return OPEN_ENDED if name in ("open ended", "free form", "open") else name


def _with_options(problem: str, fields: _Fields) -> str:
    """The problem with its options inline; some files keep them in a list of their own."""
    options = fields.record.get("options")
    if not options or split_options(problem)[1]:
        return problem
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise fields.error("options", f"{options!r} is not a list of texts")
    marked = [choice_letter(option) == chr(ord("A") + i) for i, option in enumerate(options)]
    lines = options if all(marked) else [f"{chr(ord('A') + i)}: {option}" for i, option in enumerate(options)]
    return "\n".join([problem, *lines])


@dataclass(frozen=True)
class _Fields:
    """A record whose fields are read with errors that say where."""

    record: Mapping[str, Any]
    source: str

    def error(self, key: str, reason: str) -> RowError:
        return RowError(f"{self.source}: field {key!r}: {reason}")

    def text(self, key: str, default: str | None = None) -> str:
        """A text or number as text. A missing or null field is an error unless there is a default."""
        value = self.record.get(key)
        if value is None:
            if default is None:
                raise self.error(key, f"is missing; the row has {', '.join(map(repr, self.record))}")
            return default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(key, f"must be text, not {type(value).__name__}")
        text = str(value)
        if default is None and not text.strip():
            raise self.error(key, "is empty")
        return text

    def paths(self, key: str, folder: Path) -> tuple[str, ...]:
        """A path or a list of paths, relative ones from `folder`; none where the field is missing."""
        value = self.record.get(key)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise self.error(key, f"must be a path or a list of paths, not {value!r}")
        return tuple(os.path.join(folder, v) for v in values)
