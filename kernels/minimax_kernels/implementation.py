"""Chooses which implementation of an operation serves a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def dispatch(op: str, implementations: Mapping[str, Callable[..., Any]], impl: str | None, *args: Any, **kwargs: Any):
    """Calls implementation `impl` of an operation, or with None the first that can serve.

    Args:
      op: the operation's name, for messages.
      implementations: name -> function, best first; "reference" is last and always serves.
      impl: one of the names, or None.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: from a named implementation that cannot serve these arguments.
    """
    if impl is not None:
        if impl not in implementations:
            raise ValueError(
                f"impl = {impl!r}: {op} has {', '.join(map(repr, implementations))} (or None for the best)"
            )
        return implementations[impl](*args, **kwargs)
    refusals = []
    for name, function in implementations.items():
        try:
            result = function(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
            continue
        if refusals:
            warnings.warn(f"{op} falls back to {name!r} ({'; '.join(refusals)})", stacklevel=3)
        return result
    raise NotImplementedError(f"no implementation of {op} serves this call ({'; '.join(refusals)})")
