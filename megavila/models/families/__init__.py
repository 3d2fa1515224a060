"""Model families: for each, one table of parameter mappings and a checkpoint layout."""

from megavila.models.families.family import Family
from megavila.models.families.vila import VILA
from megavila.runtime.errors import MegavilaError

_FAMILIES = {family.name: family for family in (VILA,)}


def get_family(name: str) -> Family:
    """The family `model.family` names."""
    if name not in _FAMILIES:
        raise MegavilaError(f"unknown model family {name!r}; use one of {sorted(_FAMILIES)}")
    return _FAMILIES[name]


__all__ = ["Family", "get_family"]
