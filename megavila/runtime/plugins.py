"""Functions of the user's own, named `module:function` in a config."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from megavila.runtime.errors import MegavilaError


def load_function(name: str) -> Callable[..., Any]:
    """The function called `module:function`. Raises MegavilaError that says which part of the name is wrong."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise MegavilaError(f"{name!r} does not name a function; write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and fails to import something itself
        raise MegavilaError(
            f"{name!r}: no module {error.name!r}; its directory must be on PYTHONPATH or be installed"
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MegavilaError(f"{name!r}: module {module_name!r} has no {function_name!r}{hint}")
    if not callable(function):
        raise MegavilaError(f"{name!r} is a {type(function).__name__}, not a function")
    return function
