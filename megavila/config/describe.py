"""Every key of a config with its type, default and documentation, for `--help-config` and the docs."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megavila.config.load import nested_section
from megavila.config.section import Section, type_hints, type_name


@dataclass(frozen=True)
class Knob:
    """One documented key: `default` is its text, "required" where the user must set it."""

    key: str
    type: str
    default: str
    doc: str


def describe(cls: type[Section], prefix: str = "") -> list[Knob]:
    """All leaf keys of `cls` in the order they are declared, sections flattened to dotted keys."""
    knobs: list[Knob] = []
    hints = type_hints(cls)
    for f in dataclasses.fields(cls):
        nested = nested_section(hints[f.name])
        if nested is not None:
            knobs += describe(nested, f"{prefix}{f.name}.")
        else:
            knobs.append(Knob(prefix + f.name, type_name(hints[f.name]), _default(f), f.metadata["doc"]))
    return knobs


def describe_text(cls: type[Section]) -> str:
    """The same as text, one paragraph a key."""
    return "\n".join(f"{k.key}: {k.type} = {k.default}\n    {k.doc}" for k in describe(cls))


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is dataclasses.MISSING:
        return "required"
    if f.default is None:
        return "null"
    if isinstance(f.default, bool):
        return str(f.default).lower()
    return str(list(f.default)) if isinstance(f.default, tuple) else repr(f.default)
