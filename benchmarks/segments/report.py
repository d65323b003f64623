"""The results as JSON and as a short table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_results(results: dict[str, Any], out: Path) -> None:
    """Writes segments.json."""
    (out / "segments.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def summary(results: dict[str, Any]) -> str:
    """The table that is printed last."""
    setting = results["setting"]
    lines = [
        "",
        f"{setting['device']}, jax {setting['jax']}, {setting['layers']} layers, hidden {setting['hidden']}, "
        f"{setting['dtype']}, {setting['past']} tokens of context",
        "step                 segmented us   whole us   ratio   alone us (segmented/whole)   "
        "host us a pair (boundary), outside",
    ]
    for kind, unit in (("prefill", "tokens"), ("decode", "requests")):
        lines += [_step_line(f"{kind} {row[unit]} {unit}", row) for row in results.get(kind, [])]
    for step, times in results.get("graphs", {}).items():
        lines += [f"graphs, {step}: {way:<24} {t['step_us']:10.0f} us" for way, t in times.items()]
    for name, use in results.get("launches", {}).items():
        inside, outside = sum(use["inside"].values()), use["outside"]
        lines.append(f"launches of {name}: {use['graphs']} graphs with {inside} launches, outside {outside or 'none'}")
    for name, seen in results.get("overlap", {}).items():
        lines.append(f"timeline of {name}: {_overlap(seen)}")
    if branches := results.get("branches"):
        for way, t in branches["times"].items():
            lines.append(f"branches ({branches['tokens']} tokens, MoE): {way:<20} {t['step_us']:10.0f} us")
        lines += [f"branches: {name} refused: {why}" for name, why in branches["refused"].items()]
        lines.append(f"branches: {_overlap(branches['overlap'])}")
    if memory := results.get("memory"):
        lines.append(
            f"bytes in use: {memory['before']} before the pool, {memory['captured']} captured, {memory['released']} "
            f"released; captured again in {memory['recapture_ms']:.1f} ms"
        )
    lines.append("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items()))
    if results["left_out"]:
        lines.append(f"left out for want of time: {', '.join(results['left_out'])}")
    return "\n".join(lines)


def _step_line(name: str, row: dict[str, Any]) -> str:
    one, two = row["segmented"], row["whole"]
    return (
        f"{name:<20} {one['step_us']:>12.0f} {two['step_us']:>10.0f} {row['ratio']:>7.3f}   "
        f"{one['latency_us']:>10.0f} / {two['latency_us']:<10.0f}      "
        f"{row['pair_us']:>8.0f} ({row['boundary_us']:.0f}), {row['outside_us']:.0f}"
    )


def _overlap(seen: dict[str, Any] | None) -> str:
    if seen is None:
        return "the profiler shows no kernels"
    return (
        f"{seen['kernels']} kernels on {seen['streams']} streams, added up {seen['added_us']:.0f} us, busy "
        f"{seen['busy_us']:.0f} us, from first to last {seen['span_us']:.0f} us"
    )
