"""Runs the parity checks, several cases at a time (compiling is most of the time), and sums them up."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from benchmarks.machine import describe_machine
from benchmarks.parity import big_caches, wide_selection
from benchmarks.parity.cases import cases
from benchmarks.parity.checks import CHECKS, check_op
from benchmarks.parity.compare import Result
from benchmarks.parity.samples import ParityCase

OPS = tuple(CHECKS)
WORKERS = 8  # cases at a time; each holds up to about two GB on the device


def run_parity(
    impl: str,
    ops: Sequence[str],
    out: Path,
    deadline: float,
    say: Callable[[str], None],
    quick: bool = False,
    small: bool = False,
    workers: int | None = None,
    cache_dtype: str | None = None,
) -> tuple[bool, str]:
    """Checks, writes `parity.json` to `out`, and returns (no check failed, the table to print last).

    Args:
      impl: implementation to check.
      ops: of OPS.
      out: folder for the results.
      deadline: of time.monotonic, when to start no more cases.
      say: prints progress.
      quick: fewer shapes, no caches beyond 2 GiB.
      small: small shapes, for the CPU.
      workers: cases at a time; None for as many as there are cores, up to WORKERS.
      cache_dtype: only cases over caches of this type, and nothing else; None for everything.
    """
    todo = cases(quick, small)
    if cache_dtype is not None:
        todo = [case for case in todo if (case.shape.cache_dtype or case.shape.dtype) == cache_dtype]
    say(f"parity of {impl}: {len(todo)} cases x {len(ops)} operations")
    out.mkdir(parents=True, exist_ok=True)
    machine, results, left = describe_machine(), list[Result](), list[str]()

    def write(finished: bool = False) -> None:
        """After every case, and at once: what was checked is kept, however the run ends."""
        record = {
            "machine": machine,
            "impl": impl,
            "finished": finished,
            "results": [dataclasses.asdict(result) for result in results],
            "left_out": left,
        }
        unfinished = out / "parity.json.part"
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(out / "parity.json")

    for done, (case, found) in enumerate(_checked(todo, impl, ops, deadline, workers), 1):
        if found is None:
            left.append(str(case))
            continue
        results += found
        write()
        counts = Counter(result.status for result in found)
        say(f"{done}/{len(todo)} {case}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
        for result in found:
            if result.status == "FAILED":
                say(f"  FAILED {result.op}: {result.check}: {result.detail[:300]}")
    jax.clear_caches()
    if "select_blocks" in ops and cache_dtype is None:
        results += wide_selection.check(impl, small or quick)
        write()
        say("selection of up to 16384 blocks: done")
    if not small and not quick and cache_dtype is None:
        if time.monotonic() < deadline:
            results += big_caches.check(impl, ops, say)
        else:
            left.append("caches beyond 2 and 4 GiB")
    write(finished=True)
    return all(result.status != "FAILED" for result in results), _table(results, left, machine)


def _checked(
    todo: Sequence[ParityCase], impl: str, ops: Sequence[str], deadline: float, workers: int | None
) -> Iterator[tuple[ParityCase, list[Result] | None]]:
    """Each case as it ends, with None where there was no time for it."""

    def check(case: ParityCase) -> list[Result] | None:
        if time.monotonic() > deadline:
            return None
        return [result for op in ops for result in check_op(op, case, impl)]

    workers = workers or max(1, min(WORKERS, (os.cpu_count() or 2) - 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(check, case): case for case in todo}
        for task in concurrent.futures.as_completed(running):
            yield running[task], task.result()


def _table(results: Sequence[Result], left: Sequence[str], machine: dict[str, str]) -> str:
    lines = [f"{'operation':<18}{'ok':>5}{'refused':>9}{'FAILED':>8}   largest errors"]
    for op in OPS:
        own = [result for result in results if result.op == op]
        if not own:
            continue
        counts = Counter(result.status for result in own)
        worst: dict[str, float] = {}
        for result in own:
            for name, value in result.errors.items():
                worst[name] = max(worst.get(name, 0.0), value)
        errors = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
        lines.append(f"{op:<18}{counts['ok']:>5}{counts['refused']:>9}{counts['FAILED']:>8}   {errors}")
    for status, most in (("FAILED", 12), ("refused", 12)):
        told: Counter[tuple[str, str]] = Counter()
        for result in results:
            if result.status == status:
                where = "" if status == "refused" else f"{result.case}: {result.check}: "
                told[result.op, where + result.detail[:200]] += 1
        lines += [f"{status} {op} ({count}): {detail}" for (op, detail), count in told.most_common(most)]
        if len(told) > most:
            lines.append(f"... and {len(told) - most} more kinds, see parity.json")
    if left:
        lines.append(f"left out for lack of time, {len(left)}: {'; '.join(left[:8])}")
    lines.append(f"parity on {machine['device']}, driver {machine['driver']}, jax {machine['jax']}")
    return "\n".join(lines)
