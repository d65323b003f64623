"""The benchmark part of scripts/gpu_check.py: ceilings, rows, means, targets; JSON and a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from benchmarks import measure, picture, summary
from benchmarks.cases import Baselines
from benchmarks.machine import describe_machine
from minimax_jax.rank_slice.ceilings import Ceilings, measure_ceilings


def run_bench(
    jobs: Sequence[measure.Job],
    impl: str | None,
    baselines: Baselines,
    out: Path,
    deadline: float,
    say: Callable[[str], None],
    rotate: bool = True,
) -> tuple[bool, str]:
    """Measures, writes `bench.json` and `bench.png` to `out`, and returns (no case failed, the table to print last).

    Args:
      jobs: what to measure, most urgent first.
      impl: of the operations; None for the best.
      baselines: the peer's times.
      out: folder for the results.
      deadline: of time.monotonic, when to stop.
      say: prints progress.
      rotate: False times one set of inputs over and over, as found in L2.
    """
    ceilings = _ceilings(say)
    rows, left = measure.run_jobs(jobs, impl, baselines, ceilings, deadline, say, rotate)
    found = summary.means(rows)
    checks = summary.check_targets(found)
    faster = summary.speedups(rows)
    machine = describe_machine()
    left_out = [f"{job.case.phase} {job.case.short_name} tp{job.heads.tp}" for job in left]
    record = {
        "machine": machine,
        "impl": impl or "best",
        "baseline": baselines.name,
        "rotated_inputs": rotate,
        "ceilings": dataclasses.asdict(ceilings),
        "targets": [{**dataclasses.asdict(t), "found": value, "verdict": verdict} for t, value, verdict in checks],
        "means": [dataclasses.asdict(mean) for mean in found],
        "fp8_speedups": faster,
        "rows": [dataclasses.asdict(row) for row in rows],
        "left_out": left_out,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(_rounded(record), indent=1) + "\n")
    if found and not importlib.util.find_spec("matplotlib"):
        say("no picture: matplotlib is missing (pip install 'minimax-jax[bench]')")
    elif found:
        picture.draw(
            found, f"minimax_kernels, {machine['device']}, jax {machine['jax']}, {machine['date']}", out / "bench.png"
        )
    else:
        say("nothing was measured: no picture")
    table = summary.table(found, checks)
    if faster:
        table += "\n\n" + summary.speedup_table(faster)
    fine = not any(row.refused.startswith(measure.FAILED) for row in rows)
    return fine, "\n".join(_ending(table, rows, left_out, ceilings, machine))


def _ceilings(say: Callable[[str], None]) -> Ceilings:
    begin = time.monotonic()
    small = jax.default_backend() == "cpu"
    ceilings = measure_ceilings(64 << 20, 256) if small else measure_ceilings()
    say(
        f"ceilings: copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 matmul "
        f"{ceilings.matmul_flop_per_s / 1e12:.0f} TFLOP/s ({time.monotonic() - begin:.0f} s)"
    )
    return ceilings


def _ending(
    table: str, rows: Sequence[measure.Row], left_out: list[str], ceilings: Ceilings, machine: dict[str, str]
) -> list[str]:
    lines = [table, ""]
    refused: dict[str, int] = {}
    for row in rows:
        if row.refused:
            key = f"{row.phase} {row.op} tp{row.tp}: {row.refused}"
            refused[key] = refused.get(key, 0) + 1
    lines += [f"{count} cases: {key[:240]}" for key, count in list(refused.items())[:10]]
    bound = [row for row in rows if row.host_bound]
    if bound:
        some = ", ".join(f"{row.short_name} tp{row.tp} {row.op}" for row in bound[:6])
        lines.append(f"host-bound (device may be faster), {len(bound)} rows: {some}")
    noisy = [row for row in rows if row.spread and row.spread > 0.05]
    if noisy:
        some = ", ".join(f"{row.short_name} tp{row.tp} {row.op} {row.spread:.0%}" for row in noisy[:6])
        lines.append(f"spread over 5 %, {len(noisy)} rows: {some}")
    if left_out:
        lines.append(f"left out for lack of time, {len(left_out)} cases: {', '.join(left_out[:8])}")
    lines.append(
        f"{machine['device']}, driver {machine['driver']}, jax {machine['jax']}; copy "
        f"{ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, matmul {ceilings.matmul_flop_per_s / 1e12:.0f} TFLOP/s"
    )
    return lines


def _rounded(value):
    """Six digits say it all."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
