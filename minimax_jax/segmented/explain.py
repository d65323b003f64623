"""The split of a function in words and as a picture."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

from minimax_jax.segmented.graphs import GraphUse
from minimax_jax.segmented.program import Program
from minimax_jax.segmented.split import Crossing, Segment
from minimax_jax.segmented.stats import Stats

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2", "#ff9da7", "#9c755f")
_RUN = 3  # equal steps in a row from which on the middle ones are summed up


def explain_text(label: str, program: Program, stats: Stats, graphs: Mapping[str, GraphUse], order: str) -> str:
    """A table of the steps, one of the executables, and the counters.

    Args:
      graphs: by executable, where XLA told.
      order: of a graph's kernels, in words.
    """
    split = program.split
    names = [entry.executable.name for entry in program.entries]
    lines = [
        f"segmented_jit {label!r}, {program.signature.rows} rows: {len(split.segments)} segments "
        f"({len(set(names))} executables) around {len(split.crossings)} boundaries",
        "",
        "  segment  executable  equations  inputs  captured  donated  results",
    ]
    rows = []
    for step in split.steps:
        if isinstance(step, Crossing):
            rows.append(("", f"           host: {step.label}"))
            continue
        rows.append((names[step.index], _segment_line(step, program, names[step.index])))
    lines += _folded(rows)
    lines += ["", "  executables"]
    for name, count in collections.Counter(names).items():
        seconds = next(e.executable.seconds for e in program.entries if e.executable.name == name)
        note = f"; {graphs[name]}" if name in graphs else ""
        lines.append(f"  {name:>10}  serves {count} segments, built in {seconds:.2f} s{note}")
    if any(use.graphs for use in graphs.values()):
        lines.append(f"  kernels of a graph run {order}")
    lines += ["", "  counters"]
    for field in dataclasses.fields(stats):
        value = getattr(stats, field.name)
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        lines.append(f"  {field.name:>18}  {shown}")
    if stats.seconds_per_pair is not None:
        lines.append(f"  host time of a segment and its boundary: {stats.seconds_per_pair * 1e6:.0f} us")
    return "\n".join(lines)


def _segment_line(step: Segment, program: Program, name: str) -> str:
    capture = program.entries[step.index].capture
    captured = "-" if capture is None else len(capture.arguments) - len(capture.moving)
    return (
        f"  {step.index:>7}  {name:>10}  {len(step.eqns):>9}  {len(step.invars):>6}  {captured:>8}  "
        f"{sum(step.donated):>7}  {len(step.outvars):>7}"
    )


def _folded(rows: list[tuple[str, str]]) -> list[str]:
    """Long runs of one executable are shown by their first and last segment."""
    lines: list[str] = []
    start = 0
    while start < len(rows):
        end = start
        while end < len(rows) and rows[end][0] in ("", rows[start][0]):
            end += 1
        run = rows[start:end]
        if rows[start][0] and sum(1 for name, _ in run if name) > _RUN:
            between = sum(1 for name, _ in run[2:-2] if name)
            lines += [run[0][1], run[1][1], f"      ...  {between} more segments of {rows[start][0]} ..."]
            run = run[-2:]
        lines += [text for _, text in run]
        start = max(end, start + 1)
    return lines


def explain_svg(label: str, program: Program) -> str:
    """Boxes for segments, coloured by executable, with the host's boundaries between them."""
    wide, high, gap, per_row = 84, 34, 26, 12
    names = [entry.executable.name for entry in program.entries]
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    steps = program.split.steps
    rows = max(1, math.ceil(len(steps) / per_row))
    width, height = per_row * (wide + 8) + 24, rows * (high + gap) + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11">',
        f'<text x="12" y="20" font-size="14">{escape(label)}: {program.signature.rows} rows, '
        f"{len(program.split.segments)} segments, {len(colour)} executables</text>",
    ]
    for number, step in enumerate(steps):
        x, y = 12 + number % per_row * (wide + 8), 36 + number // per_row * (high + gap)
        if isinstance(step, Segment):
            name = names[step.index]
            parts.append(f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="4" fill="{colour[name]}"/>')
            text, fill = f"{step.index}: {name}", "white"
        else:
            parts.append(
                f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="4" fill="white" stroke="#555" '
                'stroke-dasharray="4 2"/>'
            )
            text, fill = step.label.replace("'", ""), "#333"
        short = text if len(text) <= 15 else text[:14] + "…"
        parts.append(
            f'<text x="{x + 5}" y="{y + 21}" fill="{fill}">{escape(short)}<title>{escape(text)}</title></text>'
        )
    parts.append(
        f'<text x="12" y="{height - 12}" fill="#333">filled: compiled segments, one colour an executable; dashed: '
        "host functions</text></svg>"
    )
    return "\n".join(parts)
