"""Which kernels of an executable lie inside CUDA graphs, read from XLA's own dump of its launches ("thunks")."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^(\s*)\d+:\s+(k\w+)")
_AFTER, _BEFORE = "thunk_sequence_after_thunk_passes.txt", "thunk_sequence.txt"
GRAPH = "kCommandBuffer"
_MODE = "xla_gpu_command_buffer_scheduling_mode"


@dataclasses.dataclass(frozen=True)
class GraphUse:
    """The launches of one executable.

    Attributes:
      graphs: CUDA graphs (XLA's command buffers) in it.
      inside, outside: launches by kind that lie in a graph, and that do not.
    """

    graphs: int
    inside: dict[str, int]
    outside: dict[str, int]

    def __str__(self) -> str:
        if not self.graphs:
            return f"no CUDA graph; {sum(self.outside.values())} launches"
        text = f"{self.graphs} CUDA graphs with {sum(self.inside.values())} launches"
        if not self.outside:
            return text + ", none outside"
        outside = ", ".join(f"{count} {kind}" for kind, count in sorted(self.outside.items()))
        return f"{text}; outside: {outside}"


def graph_order(options: Mapping[str, Any]) -> str:
    """In words, how XLA orders the kernels of a graph under these compiler options."""
    mode = options.get(_MODE)
    if mode is None:
        return "one after the other (XLA's default)"
    return f"{mode}: " + ("side by side where none needs another" if mode == "CONCURRENT" else f"XLA's {_MODE}")


def dump_options(directory: Path) -> dict[str, str | bool]:
    """Compiler options that have XLA write its launches to `directory`."""
    return {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}


def graph_use(directory: Path, module: str) -> GraphUse | None:
    """What the dump of a module says; None if there is none, as on a CPU.

    Args:
      module: the compiled function's name.
    """
    for ending in (_AFTER, _BEFORE):  # without a graph XLA writes only the latter
        found = sorted(directory.glob(f"*.jit_{module}.*{ending}"))
        if found:
            return parse_launches(found[-1].read_text(encoding="utf-8"))
    return None


def parse_launches(text: str) -> GraphUse:
    """Reads one dump: launches are numbered lines, those of a graph stand indented under it."""
    graphs, in_graph = 0, False
    inside: collections.Counter[str] = collections.Counter()
    outside: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        indent, kind = match.groups()
        if not indent:
            in_graph = kind == GRAPH
            graphs += in_graph
        if kind != GRAPH:
            (inside if in_graph else outside)[kind] += 1
    return GraphUse(graphs, dict(inside), dict(outside))
