"""Values read from JSON or TOML, held against the types that a dataclass declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "tuple": (list, tuple), "Mapping": Mapping}


def is_of_type(declared: str, value: Any) -> bool:
    """Whether `value` is of the type named `declared`, without its parameters; of a type not known here any value is.

    An integer is a float, too; a bool is no number; a list is a tuple.
    """
    if isinstance(value, bool) and declared in ("int", "float"):
        return False
    return isinstance(value, _TYPES.get(declared, object))
