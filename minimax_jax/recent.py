"""Compiled functions of sizes that may be endlessly many: the latest few are kept."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any

KEPT_SIZES = 4


class RecentJits:
    """Jitted functions by size; whatever falls out is freed with its executables."""

    def __init__(self, make: Callable[[], tuple[Any, ...]], most: int = KEPT_SIZES):
        """
        Args:
          make: new results of `jax.jit`, of function objects of their own: equal ones would share executables.
          most: sizes to keep.
        """
        self._make, self._most = make, most
        self._lock = threading.Lock()
        self._found: collections.OrderedDict[Hashable, tuple[Any, ...]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, size: Hashable) -> tuple[Any, ...]:
        """The functions of a size."""
        with self._lock:
            found = self._found.pop(size, None)
            self._found[size] = found = self._make() if found is None else found
            dropped = [self._found.popitem(last=False)[1] for _ in range(len(self._found) - self._most)]
        for jitted in (function for functions in dropped for function in functions):
            jitted.clear_cache()
        return found
