"""Reward functions of the user's own, named `module:function`."""

from __future__ import annotations

import math
from collections.abc import Callable

from megavila.data.row import Row
from megavila.runtime.errors import MegavilaError
from megavila.runtime.plugins import load_function

__all__ = ["RewardFunction", "call_function", "load_function"]

RewardFunction = Callable[[Row, str], float]
"""(row, response text) -> reward."""


def call_function(name: str, function: RewardFunction, row: Row, text: str) -> float:
    """Call a plug-in; what it raises gets a note saying where, and what it returns must be a finite number."""
    try:
        value = function(row, text)
    except Exception as error:
        error.add_note(f"raised by reward function {name!r} for row {row.source or row.problem_id}")
        raise
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MegavilaError(
            f"reward function {name!r} returned {value!r} for row {row.source or row.problem_id}; "
            "it must return a finite number"
        )
    return number
