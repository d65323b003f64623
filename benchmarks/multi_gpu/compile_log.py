"""Says what XLA has compiled, while a long run would be silent. Host code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def saying_compiles(say: Callable[[str], None], least_s: float = 1.0) -> Iterator[dict[str, Any]]:
    """Says each program that took `least_s` seconds or more to compile, while in here.

    Yields:
      "programs" compiled so far, and the "seconds" that took, shorter ones included.
    """
    totals = {"programs": 0, "seconds": 0.0}

    def listen(event: str, seconds: float, **details: object) -> None:
        if event != _EVENT:
            return
        totals["programs"] += 1
        totals["seconds"] += seconds
        if seconds >= least_s:
            say(f"    compiled {details.get('fun_name', 'a program')} in {seconds:.1f} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield totals
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
