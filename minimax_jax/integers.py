"""What counts as an integer where a user gives one."""

from __future__ import annotations

import operator
from typing import Any


def as_integer(value: Any) -> int | None:
    """A Python integer from whatever stands for one, NumPy's included; None for all else, bools too."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer_within(value: Any, least: float, most: float = float("inf")) -> int | None:
    """The same, None also for one out of a range."""
    found = as_integer(value)
    return found if found is not None and least <= found <= most else None


def require_integer(name: str, value: Any, least: int) -> int:
    """The same; raises ValueError, which names the argument, for what is none or less."""
    if (found := integer_within(value, least)) is None:
        raise ValueError(f"{name} = {value!r}: must be an integer >= {least}")
    return found
