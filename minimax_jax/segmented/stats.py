"""Counters of a segmented function."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stats:
    """A snapshot of what a segmented function did.

    Attributes:
      segments: of the function (of the longest split, if buckets differ).
      executables: distinct ones over all buckets.
      buckets: those that were called; captured: how many programs are captured now.
      traces: programs traced, exact sizes included.
      warmups, captures, replays: calls by kind.
      fallbacks: calls above the largest bucket, run at their exact size; eager: calls of `eager`.
      failures: calls that raised.
      invalidations: how often captures were cleared, by `invalidate` or an epoch.
      trace_seconds, compile_seconds: spent building; compilation is added up over threads.
      replay_seconds: host time of the segments and boundaries of all replays, without the checks of the arguments
        before them; boundary_seconds: inside boundaries of these.
      pairs: boundaries that were crossed in replays, each with the segment before it.
    """

    segments: int
    executables: int
    buckets: tuple[int, ...]
    captured: int
    traces: int
    warmups: int
    captures: int
    replays: int
    fallbacks: int
    eager: int
    failures: int
    invalidations: int
    trace_seconds: float
    compile_seconds: float
    replay_seconds: float
    boundary_seconds: float
    pairs: int

    @property
    def seconds_per_pair(self) -> float | None:
        """Host time of one segment and its boundary in replays; None before the first."""
        return self.replay_seconds / self.pairs if self.pairs else None


@dataclasses.dataclass
class Counts:
    """The counters while they count; whoever writes holds the function's lock."""

    traces: int = 0
    warmups: int = 0
    captures: int = 0
    replays: int = 0
    fallbacks: int = 0
    eager: int = 0
    failures: int = 0
    trace_seconds: float = 0.0
    replay_seconds: float = 0.0
    boundary_seconds: float = 0.0
    pairs: int = 0

    def snapshot(self, **rest: Any) -> Stats:
        """Frozen, with what is counted elsewhere."""
        return Stats(**dataclasses.asdict(self), **rest)
