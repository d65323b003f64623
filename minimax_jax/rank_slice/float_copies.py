"""Looks in a compiled step for copies of 8-bit weights in floats."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\(")
_FLOATS = re.compile(r"(?:bf16|f16|f32)\[([\d,]+)\]")
_NOTHING_WRITTEN = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional")


_MOST_JOINED = 5  # projections of the same inputs, as of one layer's attention


def float_copies(hlo: str, shapes: Iterable[tuple[int, ...]], others: Iterable[tuple[int, ...]] = ()) -> list[str]:
    """Instructions of a compiled module that leave floats of the size of a quantised weight in memory.

    Found are a weight's shape with its axes in any order, its numbers as a flat array, up to five matrices of the same
    inputs side by side, and one or several experts of a stack. What a fused kernel computes on its way stays in
    registers and is not counted, only what it writes; nor are strips of a weight.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.
      shapes: of the weights, [in, out] or [experts, in, out]; axes of extent 1 are ignored.
      others: of arrays that are floats anyway, such as routers and pages: not counted in exactly this shape.
    """
    weights, known = set(shapes), {_squeezed(shape) for shape in others}
    stacks = {shape for shape in weights if len(shape) == 3}
    matrices = {shape for shape in weights if len(shape) == 2}
    wanted = {form for shape in weights for form in (_sorted(shape), (math.prod(shape),))}
    for inputs in {shape[0] for shape in matrices}:
        outputs = sorted(shape[1] for shape in matrices if shape[0] == inputs)
        for count in range(2, _MOST_JOINED + 1):
            for joined in itertools.combinations_with_replacement(outputs, count):
                wanted |= {_sorted((inputs, sum(joined))), (inputs * sum(joined),)}
    for experts, *matrix in stacks:
        for count in range(1, experts + 1):
            wanted |= {_sorted((count, *matrix)), (count * math.prod(matrix),)}
    fused = {name for line in hlo.splitlines() if " fusion(" in line for name in _CALLED.findall(line)}
    found, skipped = [], False
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            skipped = match[1] in fused
        elif not skipped and (match := _INSTRUCTION.match(line)) and match[3] not in _NOTHING_WRITTEN:
            results = (_squeezed(map(int, shape.split(","))) for shape in _FLOATS.findall(match[2]))
            found += [match[1] for shape in results if shape not in known and _sorted(shape) in wanted]
    return found


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(extent for extent in shape if extent != 1)


def _sorted(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(_squeezed(shape)))
