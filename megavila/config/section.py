"""The base of every config section: documented, type-checked, frozen dataclasses."""

import types
import typing
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from megavila.runtime.errors import MegavilaError


class ConfigError(MegavilaError):
    """A setting that is unknown, has the wrong type, is out of range or contradicts another one."""


def knob(default: Any, doc: str) -> Any:
    """A dataclass field with a default value and the documentation that `describe` prints."""
    return field(default=default, metadata={"doc": doc})


def required(doc: str) -> Any:
    """A documented dataclass field that the user must set."""
    return field(metadata={"doc": doc})


def subsection(factory: type, doc: str) -> Any:
    """A documented nested section, `factory()` when the user leaves it out."""
    return field(default_factory=factory, metadata={"doc": doc})


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """Resolved annotations of a section class, by field name."""
    return typing.get_type_hints(cls)


def type_name(hint: Any) -> str:
    """How an annotation is written to a user: `int | None`, `one of a, b`, `list of float`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in args)
    if origin is tuple:
        return (
            f"list of {type_name(args[0])}"
            if args[-1] is ...
            else f"list of {len(args)} {type_name(args[0])}"
        )
    if isinstance(hint, type) and issubclass(hint, Section):
        return "a section of keys and values"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (int to float, list to tuple, scalar to tuple of one), else TypeError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
    elif origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option)
            except TypeError:
                continue
    elif origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        if args[-1] is ...:
            return tuple(_coerce(v, args[0]) for v in items)
        if len(items) == len(args):
            return tuple(_coerce(v, a) for v, a in zip(items, args, strict=True))
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, hint):
        return value
    raise TypeError(type_name(hint))


@dataclass(frozen=True, kw_only=True)
class Section:
    """Checks field types on construction, then calls `validate`, which subclasses override.

    Lists become tuples, so that a section is hashable; a lone value where a list is expected becomes
    a list of one.
    """

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            try:
                self.resolve(f.name, _coerce(value, hints[f.name]))
            except TypeError:
                raise ConfigError(
                    f"{f.name} is {value!r} ({type(value).__name__}), must be {type_name(hints[f.name])}"
                ) from None
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError where values are out of range or contradict each other."""

    def resolve(self, name: str, value: Any) -> None:
        """Sets a field during construction: used where a default depends on other fields."""
        object.__setattr__(self, name, value)

    def require_at_least(self, minimum: float, *names: str) -> None:
        """Raises ConfigError where a named field that is not None is below `minimum`."""
        for name in names:
            value = getattr(self, name)
            require(value is None or value >= minimum, f"{name} is {value}, must be at least {minimum}")

    def require_positive(self, *names: str) -> None:
        """Raises ConfigError where a named field that is not None is not greater than zero."""
        for name in names:
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}, must be greater than 0")

    def require_between(self, low: float, high: float, *names: str) -> None:
        """Raises ConfigError where a named field that is not None is outside [low, high]."""
        for name in names:
            value = getattr(self, name)
            require(value is None or low <= value <= high, f"{name} is {value}, must be from {low} to {high}")
