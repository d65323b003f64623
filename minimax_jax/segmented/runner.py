"""What is remembered of one segment: per bucket its executable, its warm-up and what a capture holds."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import jax

from minimax_jax.segmented.epoch import Epoch
from minimax_jax.segmented.executables import Executable


@dataclasses.dataclass(frozen=True)
class Capture:
    """A segment's call, ready to be replayed.

    Attributes:
      arguments: its inputs, None where they come with each call.
      moving: (position in `arguments`, slot of the call's values) of the inputs that come with each call.
      addresses: of the captured inputs, by position; empty where the device tells none.
      outputs: shapes and dtypes of its results.
      output_addresses: where they lay when it was captured. XLA's allocator gives each call buffers of its own, so
        a replay may find other ones, and no result is ever overwritten by the next call.
      leaves: the function's leaves as all segments of this capture hold them, None for those that move.
      epoch, life: whose life the capture belongs to, and which.
    """

    arguments: tuple[Any, ...]
    moving: tuple[tuple[int, int], ...]
    addresses: dict[int, int]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    output_addresses: tuple[int, ...]
    leaves: tuple[Any, ...]
    epoch: weakref.ref[Epoch] | None
    life: int

    def belongs_to(self, epoch: Epoch | None) -> bool:
        """Whether it was captured with these resources, in whatever life of theirs."""
        return (self.epoch() if self.epoch else None) is epoch


class Record:
    """Warm-up and capture in one bucket: of a segment, or of a whole call that has none.

    Attributes:
      warmups: eager calls so far.
      capture: None before it was captured, and after `clear`.
    """

    def __init__(self) -> None:
        self.warmups = 0
        self.capture: Capture | None = None

    def clear(self) -> None:
        """Forgets the warm-up and everything captured."""
        self.warmups = 0
        self.capture = None


class Entry(Record):
    """One segment in one bucket.

    Attributes:
      executable: compiled; survives `clear`.
    """

    def __init__(self, executable: Executable):
        super().__init__()
        self.executable = executable


class Runner:
    """One segment over all buckets; the first one also stands for calls without segments.

    Attributes:
      index: which segment, counted from the function's start.
      entries: by bucket (the signature of its program).
      clears: how often it was cleared.
    """

    def __init__(self, index: int):
        self.index = index
        self.clears = 0
        self.entries: dict[Hashable, Record] = {}

    def clear(self) -> None:
        """Clears every bucket; executables and buckets stay, so that capturing again compiles nothing."""
        self.clears += 1
        for entry in list(self.entries.values()):
            entry.clear()


def addresses_of(values: Sequence[Any]) -> dict[int, int]:
    """Device addresses by position, of the arrays that have one."""
    found = {}
    for position, value in enumerate(values):
        if isinstance(value, jax.Array) and len(value.devices()) == 1 and not value.is_deleted():
            found[position] = value.unsafe_buffer_pointer()
    return found
