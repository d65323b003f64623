"""Epochs: how resources that captured calls hold on to say that they have been replaced."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from minimax_jax.segmented.errors import StaleCaptureError


class Clearable(Protocol):
    """Something that remembers what belongs to an epoch and can forget it."""

    def clear(self) -> None:
        """Forgets captured buffers, addresses, outputs and warm-up state."""


class Epoch:
    """Counts the lives of a resource, such as a pool of pages.

    Whoever replaces or frees the resource calls `advance` first: every watcher is cleared, so nothing captured in
    the old life is replayed. What slips through (a call in flight, a stamp kept too long) raises
    `StaleCaptureError` at its next `check`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0
        self._watchers: weakref.WeakSet[Clearable] = weakref.WeakSet()

    @property
    def value(self) -> int:
        """The number of the current life."""
        return self._value

    def watch(self, watcher: Clearable) -> None:
        """Has `watcher` cleared at every advance; it is held weakly."""
        with self._lock:
            self._watchers.add(watcher)

    def advance(self) -> int:
        """Ends the current life and clears all watchers; returns the new number."""
        with self._lock:
            self._value += 1
            watchers = list(self._watchers)
            self._watchers.clear()
        for watcher in watchers:
            watcher.clear()
        return self._value

    def check(self, value: int, what: str) -> None:
        """Raises `StaleCaptureError` if `what` was made in another life than the current one."""
        if value != self._value:
            raise StaleCaptureError(
                f"{what} belongs to epoch {value}, and its resources are at epoch {self._value}: they were resized or "
                "released since; prepare the call again"
            )
