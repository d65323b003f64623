"""One compiled executable for all segments that are the same."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
import time
from collections.abc import Hashable, Mapping
from typing import Any

from minimax_jax.segmented.jaxprs import sub_jaxpr
from minimax_jax.segmented.keys import Keys
from minimax_jax.segmented.placement import Placement
from minimax_jax.segmented.split import Segment, Split

_COMPILING_THREADS = 4  # XLA compiles without Python's lock; more threads than this only take memory


@dataclasses.dataclass(frozen=True)
class Executable:
    """A compiled segment.

    Attributes:
      name: a short label, A, B, ... in the order of compilation.
      compiled: `jax.stages.Compiled` over the segment's inputs, flat.
      seconds: of lowering and compiling.
    """

    name: str
    compiled: Any
    seconds: float


class Executables:
    """Compiles segments, each distinct one once. Outlives invalidation: nothing in here knows of buffers."""

    def __init__(self, label: str, compiler_options: Mapping[str, Any] | None):
        self._label = label
        self._options = dict(compiler_options or {})
        self._lock = threading.Lock()
        self._built: dict[Hashable, Executable] = {}

    def __len__(self) -> int:
        return len(self._built)

    @property
    def seconds(self) -> float:
        """Spent on lowering and compiling, added up over threads."""
        return sum(executable.seconds for executable in self._built.values())

    def build(self, split: Split, placement: Placement) -> list[Executable]:
        """The executables of all segments of a split, in order; new ones are compiled side by side."""
        with self._lock:
            seen = Keys()
            keys = [self._key(seen, segment, placement) for segment in split.segments]
            missing: dict[Hashable, Segment] = {}
            for key, segment in zip(keys, split.segments, strict=True):
                if key not in self._built:
                    missing.setdefault(key, segment)
            if missing:
                workers = min(_COMPILING_THREADS, len(missing), os.cpu_count() or 1)
                with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                    waiting: dict[Hashable, tuple[str, Any]] = {}
                    for key, segment in missing.items():
                        start = time.perf_counter()
                        name = _letters(len(self._built) + len(waiting))
                        jaxpr = sub_jaxpr(split.traced.source, segment.eqns, segment.invars, segment.outvars)
                        lowered = placement.lower(segment, jaxpr, f"{self._label}_{name}")
                        spent = time.perf_counter() - start
                        waiting[key] = (name, pool.submit(self._compile, lowered, spent))
                    for key, (name, future) in waiting.items():
                        compiled, seconds = future.result()
                        self._built[key] = Executable(name, compiled, seconds)
            return [self._built[key] for key in keys]

    def _compile(self, lowered: Any, spent: float) -> tuple[Any, float]:
        start = time.perf_counter()
        compiled = lowered.compile(self._options) if self._options else lowered.compile()
        return compiled, spent + time.perf_counter() - start

    def _key(self, seen: Keys, segment: Segment, placement: Placement) -> Hashable:
        return (
            seen.equations(segment.eqns, segment.invars, segment.outvars),
            segment.donated,
            placement.key((*segment.invars, *segment.outvars)),
        )


def _letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(65 + digit) + text
    return text
