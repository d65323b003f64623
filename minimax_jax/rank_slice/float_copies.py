"""Looks in a compiled step for copies of 8-bit weights in floats."""

from __future__ import annotations

import re
from collections.abc import Iterable

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\(")
_FLOATS = re.compile(r"(?:bf16|f16|f32)\[([\d,]+)\]")
_NOTHING_WRITTEN = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional")


def float_copies(hlo: str, shapes: Iterable[tuple[int, ...]]) -> list[str]:
    """Instructions of a compiled module that leave an array of floats of one of these shapes in memory.

    What a fused kernel computes on its way stays in registers and is not counted, only what it writes.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.
      shapes: of the weights; axes of extent 1 are ignored.
    """
    wanted = {_squeezed(shape) for shape in shapes}
    fused = {name for line in hlo.splitlines() if " fusion(" in line for name in _CALLED.findall(line)}
    found, skipped = [], False
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            skipped = match[1] in fused
        elif not skipped and (match := _INSTRUCTION.match(line)) and match[3] not in _NOTHING_WRITTEN:
            results = (_squeezed(map(int, shape.split(","))) for shape in _FLOATS.findall(match[2]))
            found += [match[1] for shape in results if shape in wanted]
    return found


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(extent for extent in shape if extent != 1)
