"""Prompt templates: jinja files in which media are slots, not text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2

from megavila.data.row import MULTIPLE_CHOICE, Row
from megavila.runtime.errors import MegavilaError

_FOLDER = Path(__file__).parent / "templates"
_SUFFIX = ".jinja"


class Part(NamedTuple):
    """A piece of a rendered prompt.

    `kind` is "template" (our text: special tokens in it are tokens), "row" (the row's text: nothing in it is special)
    or "video", with the number of the row's video as `video`.
    """

    kind: Literal["template", "row", "video"]
    text: str
    video: int = -1


@dataclass(frozen=True)
class Choice:
    """An option as templates see it."""

    letter: str
    text: str


class PromptTemplate:
    """Renders a row to text with slots for its videos.

    A template is a jinja file. It may use `media` (all videos, one after another) or `videos` (a list with one slot
    each), `problem` (question and options as the row has them), `question`, `options` (each with `letter` and
    `text`), `multiple_choice`, `duration` (seconds of the first video, None without one) and `extra` (the row's other
    columns); it may extend or include built-in templates and files beside it. Each video must be placed exactly once.

    What the row brings is kept apart from what the template writes, so a literal `<image>`, `{media}` or `<|im_end|>`
    in a question stays text.
    """

    def __init__(self, name: str) -> None:
        """`name` is that of a built-in template or the path of a file. Raises MegavilaError."""
        self.name = name
        path = Path(name)
        builtin = sorted(file.stem for file in _FOLDER.glob(f"*{_SUFFIX}"))
        if name in builtin:
            folder, file = _FOLDER, name + _SUFFIX
        elif path.is_file():
            folder, file = path.parent, path.name
        else:
            raise MegavilaError(
                f"data.template={name!r} is neither a file nor a built-in template; those are {', '.join(builtin)}"
            )
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([folder, _FOLDER]),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        try:
            self._template = environment.get_template(file)
        except jinja2.TemplateSyntaxError as error:
            raise MegavilaError(f"template {error.filename}:{error.lineno}: {error.message}") from error
        except (jinja2.TemplateNotFound, UnicodeDecodeError) as error:
            raise MegavilaError(f"template {path}: {error}") from error

    def render(self, row: Row, duration: float | None = None) -> list[Part]:
        """The prompt of `row` in parts. Raises MegavilaError where the template cannot be applied to it."""
        holes = _Holes(self._seal(row))
        videos = [holes.make(Part("video", "", number)) for number in range(len(row.videos))]
        try:
            text = self._template.render(
                media="".join(videos),
                videos=videos,
                problem=holes.make(Part("row", row.problem)),
                question=holes.make(Part("row", row.question)),
                options=[Choice(o.letter, holes.make(Part("row", o.text))) for o in row.options],
                multiple_choice=row.problem_type == MULTIPLE_CHOICE,
                duration=duration,
                extra={
                    k: holes.make(Part("row", v)) if isinstance(v, str) else v for k, v in row.extra.items()
                },
            )
        except jinja2.TemplateError as error:
            raise MegavilaError(
                f"template {self.name!r} on row {row.source or row.problem_id}: {error}"
            ) from error
        parts = holes.split(text)
        placed = [part.video for part in parts if part.kind == "video"]
        if sorted(placed) != list(range(len(row.videos))):
            raise MegavilaError(
                f"template {self.name!r} places the videos {placed} of a row with {len(row.videos)}; "
                "write {{ media }} once, or each of {{ videos }} once"
            )
        return parts

    @staticmethod
    def _seal(row: Row) -> str:
        """A mark that occurs in no text of the row. (A jinja file holds no NUL.)"""
        texts = row.problem + "".join(value for value in row.extra.values() if isinstance(value, str))
        mark = "\0"
        while mark in texts:
            mark += "\0:"
        return mark


class _Holes:
    """Stand-ins for parts while jinja works on text."""

    def __init__(self, seal: str) -> None:
        self._seal = seal
        self._parts: list[Part] = []

    def make(self, part: Part) -> str:
        self._parts.append(part)
        return f"{self._seal}{len(self._parts) - 1}{self._seal}"

    def split(self, text: str) -> list[Part]:
        pieces: Sequence[str] = text.split(self._seal)
        parts = [
            self._parts[int(piece)] if number % 2 else Part("template", piece)
            for number, piece in enumerate(pieces)
        ]
        return [part for part in parts if part.text or part.kind == "video"]
