"""Weighted means of the measured rows, and how they stand against the targets of the kernels' issue."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Row


@dataclasses.dataclass(frozen=True)
class Mean:
    """One op over a group of cases; times are means weighted by calls, equal weights where all weights are 0.

    Attributes:
      ratio: the baseline's mean time over ours.
      geomean: the geometric mean of the cases' ratios, unweighted.
      floor_share: mean floor over mean time.
    """

    group: str
    op: str
    cases: int
    us: float
    vllm_us: float | None
    ratio: float | None
    geomean: float | None
    floor_us: float
    floor_share: float
    tflops: float | None


@dataclasses.dataclass(frozen=True)
class Target:
    """A line of the issue's table. `kind`: ratio, share (of the floor), tflops (at least) or us (at most)."""

    text: str
    group: str
    op: str
    kind: str
    least: float | None
    aim: float | None


def _targets() -> list[Target]:
    found = []
    for tp in (1, 8):
        big, small = f"decode tp{tp} batch>=32", f"decode tp{tp} batch 1-8"
        found += [
            Target(f"decode chain TP{tp}, batch >= 32", big, "chain", "ratio", 1.0, 1.1),
            Target(f"decode chain TP{tp}, batch >= 32, of copy bandwidth", big, "chain", "share", 0.9, None),
            Target(f"decode chain TP{tp}, batch 1-8", small, "chain", "ratio", 1.2, 2.0),
        ]
    found += [
        Target("decode sparse attention TP8, batch 64", "decode tp8 batch 64", "attention", "ratio", 1.25, None),
        Target("decode sparse attention TP8, batch 64, us", "decode tp8 batch 64 full", "attention", "us", None, 24.0),
    ]
    for tp, least in ((1, 1.2), (8, 1.5)):
        for rho in (0.99, 0.0):
            group = f"prefill tp{tp} rho {rho}"
            over, wanted = ("overlapping", (1.8, 3.0)) if rho else ("independent", (1.1, 2.0))
            name = f"TP{tp} rho {rho}"
            found += [
                Target(f"prefill score {name}", group, "score", "ratio", least, None),
                Target(f"prefill score {name}, TFLOP/s", group, "score", "tflops", None, 550.0),
                Target(f"prefill select {name}", group, "select", "ratio", 5.0, 20.0),
                Target(f"prefill sparse attention {name} ({over})", group, "attention", "ratio", *wanted),
                Target(f"prefill chain {name}", group, "chain", "ratio", 1.8, 3.0),
            ]
    return found


TARGETS = _targets()
FP8_GROUP = ", fp8"


def groups_of(row: Row) -> list[str]:
    """The groups that a row counts in; those of 8-bit caches are their own."""
    groups = _groups(row)
    return groups if row.cache_dtype == "bfloat16" else [f"{group}{FP8_GROUP}" for group in groups]


def _groups(row: Row) -> list[str]:
    if row.phase == "prefill":
        return [f"prefill tp{row.tp} rho {row.rho}"]
    groups = [f"decode tp{row.tp}"]
    if row.batch >= 32:
        groups.append(f"decode tp{row.tp} batch>=32")
    if row.batch <= 8:
        groups.append(f"decode tp{row.tp} batch 1-8")
    if row.batch == 64:
        groups.append(f"decode tp{row.tp} batch 64")
        if row.longest >= 4000:  # long enough for 16 full blocks
            groups.append(f"decode tp{row.tp} batch 64 full")
    return groups


def means(rows: Sequence[Row]) -> list[Mean]:
    """Every group and op that has a time, in the order of the rows."""
    members: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.us is not None:
            for group in groups_of(row):
                members.setdefault((group, row.op), []).append(row)
    return [_mean(group, op, own) for (group, op), own in sorted(members.items())]


def _mean(group: str, op: str, rows: Sequence[Row]) -> Mean:
    weights = [row.weight for row in rows]
    if not sum(weights):
        weights = [1] * len(rows)
    total = sum(weights)

    def weighted(values: Sequence[float | None]) -> float | None:
        if any(value is None for value in values):
            return None
        return sum(w * v for w, v in zip(weights, values, strict=True)) / total  # type: ignore[operator]

    us = weighted([row.us for row in rows])
    floor = weighted([row.floor_us for row in rows])
    vllm = weighted([row.vllm_us for row in rows])
    flops = weighted([row.tflops * row.us if row.tflops and row.us else None for row in rows])
    ratios = [row.ratio for row in rows if row.ratio]
    assert us is not None and floor is not None
    return Mean(
        group=group,
        op=op,
        cases=len(rows),
        us=us,
        vllm_us=vllm,
        ratio=vllm / us if vllm else None,
        geomean=math.exp(sum(map(math.log, ratios)) / len(ratios)) if len(ratios) == len(rows) else None,
        floor_us=floor,
        floor_share=floor / us,
        tflops=flops / us if flops else None,
    )


def speedups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each group and op: 8-bit caches against bf16 ones, over the cases that were measured with both."""
    times: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.us is not None:
            key = (row.phase, row.op, row.case, row.tp, row.rho)
            times.setdefault(key, {})[row.cache_dtype] = row
    both = [row for found in times.values() if len(found) == 2 for row in found.values()]
    by_key = {(mean.group, mean.op): mean for mean in means(both)}
    return [
        {
            "group": group,
            "op": op,
            "cases": wide.cases,
            "bf16_us": wide.us,
            "fp8_us": narrow.us,
            "speedup": wide.us / narrow.us,
            "fp8_floor_share": narrow.floor_share,
        }
        for (group, op), wide in by_key.items()
        if (narrow := by_key.get((group + FP8_GROUP, op))) is not None
    ]


def speedup_table(found: Sequence[dict[str, Any]]) -> str:
    """`speedups` as text."""
    lines = [f"{'fp8 caches over bf16':<26}{'op':<10}{'n':>3}{'bf16 us':>9}{'fp8 us':>9}{'speed':>7}{'of floor':>9}"]
    lines += [
        f"{mean['group']:<26}{mean['op']:<10}{mean['cases']:>3}{mean['bf16_us']:>9.1f}{mean['fp8_us']:>9.1f}"
        f"{mean['speedup']:>7.2f}{mean['fp8_floor_share']:>9.1%}"
        for mean in found
    ]
    return "\n".join(lines)


def check_targets(found: Sequence[Mean]) -> list[tuple[Target, float, str]]:
    """(target, measured, "aim" | "met" | "MISSED") of every target that has a measurement."""
    by_key = {(mean.group, mean.op): mean for mean in found}
    results = []
    for target in TARGETS:
        mean = by_key.get((target.group, target.op))
        if mean is None:
            continue
        value = {"ratio": mean.ratio, "share": mean.floor_share, "tflops": mean.tflops, "us": mean.us}[target.kind]
        if value is None:
            continue
        results.append((target, value, _verdict(target, value)))
    return results


def _verdict(target: Target, value: float) -> str:
    def reached(bound: float) -> bool:
        return value <= bound if target.kind == "us" else value >= bound

    if target.aim is not None and reached(target.aim):
        return "aim"
    if target.least is None:
        return "below aim"
    return "met" if reached(target.least) else "MISSED"


def table(found: Sequence[Mean], checks: Sequence[tuple[Target, float, str]]) -> str:
    """Both as text, short enough for the end of a log."""
    lines = [
        f"{'group':<31}{'op':<10}{'n':>3}{'us':>9}{'vLLM':>9}{'ratio':>7}{'geo':>6}{'floor':>8}{'share':>7}{'TF/s':>6}"
    ]
    lines += [
        f"{mean.group:<31}{mean.op:<10}{mean.cases:>3}{mean.us:>9.1f}{_number(mean.vllm_us, '9.1f')}"
        f"{_number(mean.ratio, '7.2f')}{_number(mean.geomean, '6.2f')}{mean.floor_us:>8.1f}"
        f"{mean.floor_share:>7.1%}{_number(mean.tflops, '6.0f')}"
        for mean in found
    ]
    if checks:
        lines += ["", f"{'target':<58}{'least':>7}{'aim':>7}{'found':>8}"]
    for target, value, verdict in checks:
        least, aim = _number(target.least, "7g"), _number(target.aim, "7g")
        lines.append(f"{target.text:<58}{least}{aim}{value:>8.2f} {verdict}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    width = int(form.rstrip("fg%").split(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"
