"""YAML file + `key=value` overrides -> frozen dataclasses, and back."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megavila.config.section import ConfigError, Section, require, type_hints

S = TypeVar("S", bound=Section)


def load_config(cls: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Builds `cls` from a YAML file (or none) and overrides such as `optimizer.lr=1e-5`, which win.

    Overrides are parsed as YAML values: numbers, true/false, null, [lists]. `${section.key}` refers to
    another key. Raises ConfigError naming the file or override, the key and the nearest valid one.
    """
    known = config_keys(cls)
    merged = OmegaConf.create(_defaults(cls))
    if path is not None:
        loaded = _read_yaml(path)
        # Keys first: an unknown one is named even where a `${...}` beside it cannot be resolved.
        _check_keys(cast(dict[str, Any], OmegaConf.to_container(loaded)), known, str(path))
        merged = OmegaConf.merge(merged, loaded)
    for override in overrides:
        merged = OmegaConf.merge(merged, _parse_override(override, known))
    source = " + ".join([str(path)] * (path is not None) + ["overrides"] * bool(overrides)) or "config"
    return build(cls, _resolved(merged, source), source)


def build(cls: type[S], values: Mapping[str, Any], source: str = "config") -> S:
    """Builds a section from nested dictionaries; errors begin with `source` and the dotted key."""
    _check_keys(values, config_keys(cls), source)
    return _build(cls, values, source, "")


def save_config(config: Section, path: Path) -> None:
    """Writes every key of the resolved config as YAML that `load_config` reads back to an equal object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def to_dict(config: Section) -> dict[str, Any]:
    """Nested plain dictionaries and lists: what JSON and YAML can hold."""
    return _plain(dataclasses.asdict(config))


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain dictionaries of a YAML file, such as a run's config.yaml. Raises ConfigError."""
    return _resolved(_read_yaml(path), str(path))


def nested_section(hint: Any) -> type[Section] | None:
    """The section class of an annotation `C` or `C | None`, else None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def config_keys(cls: type[Section], prefix: str = "") -> dict[str, bool]:
    """Every dotted key of a section class in order; True for those that are sections themselves."""
    keys: dict[str, bool] = {}
    for name, hint in type_hints(cls).items():
        nested = nested_section(hint)
        keys[prefix + name] = nested is not None
        if nested is not None:
            keys |= config_keys(nested, f"{prefix}{name}.")
    return keys


def _defaults(cls: type[Section]) -> dict[str, Any]:
    """The declared defaults as a tree, so that `${section.key}` can refer to a key nobody set."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        hint = type_hints(cls)[f.name]
        nested = nested_section(hint)
        if nested is not None and hint is nested:
            tree[f.name] = _defaults(nested)
        elif f.default is not dataclasses.MISSING:
            tree[f.name] = _plain(f.default)
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(
            f"config file {path} does not exist" + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold keys and values, such as 'run: {{name: first}}'")
    return loaded


def _resolved(loaded: Any, source: str) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None


def _parse_override(override: str, known: Mapping[str, bool]) -> DictConfig:
    key, separator, _ = override.partition("=")
    require(
        bool(key and separator), f"override {override!r} must look like key=value, such as optimizer.lr=1e-5"
    )
    _require_known(key, known, f"override {override!r}")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from None


def _check_keys(values: Mapping[str, Any], known: Mapping[str, bool], source: str, prefix: str = "") -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        _require_known(key, known, source)
        if known[key] and isinstance(value, Mapping):
            _check_keys(value, known, source, f"{key}.")


def _require_known(key: str, known: Mapping[str, bool], source: str) -> None:
    if key not in known:
        raise ConfigError(f"{source}: unknown key {key!r}; {suggest(key, known)}")


def suggest(key: str, known: Mapping[str, bool]) -> str:
    """`did you mean optimizer.lr?`, looking at the whole dotted key first and then at its last part."""
    parent, _, name = key.rpartition(".")
    if known.get(parent) or not parent:
        siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
        if near := difflib.get_close_matches(name, siblings, n=1):
            return f"did you mean {siblings[near[0]]}?"
    leaves = [k for k, is_section in known.items() if not is_section]
    near = [k for k in leaves if k.rpartition(".")[2] == name]  # the right name under the wrong section
    near = near or difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)
    if not near:
        last = {k.rpartition(".")[2]: k for k in reversed(leaves)}
        near = [last[n] for n in difflib.get_close_matches(name, last, n=1, cutoff=0.75)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    parent = parent if known.get(parent) else ""
    return "valid keys are " + ", ".join(k for k in known if k.rpartition(".")[0] == parent)


def _build(cls: type[S], values: Mapping[str, Any], source: str, prefix: str) -> S:
    hints = type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        nested = nested_section(hints[name])
        if nested is not None and isinstance(value, Mapping):
            value = _build(nested, value, source, f"{prefix}{name}.")
        arguments[name] = value
    where = f"{source}: {prefix.rstrip('.')}: " if prefix else f"{source}: "
    for f in dataclasses.fields(cls):
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if f.name not in arguments and not optional:
            nested = nested_section(hints[f.name])
            if nested is None:
                raise ConfigError(f"{source}: {prefix}{f.name} is not set: {f.metadata['doc']}")
            arguments[f.name] = _build(nested, {}, source, f"{prefix}{f.name}.")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
