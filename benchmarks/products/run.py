"""Compiles every case's launches with all cores, then checks and times them with nothing else running."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import timing
from benchmarks.products.case_run import CaseRun
from benchmarks.products.cases import Case
from benchmarks.products.errors import Errors, measure_errors
from minimax_jax.rank_slice.ceilings import Ceilings
from minimax_kernels.matmul_launches import MatmulLaunch

COMPILING = 0.5  # share of the time that compiling may take
KEPT = 1.01  # of candidates within 1 % the first is taken
PROGRESS_SECONDS = 10
NOT_COMPILED = "not compiled in time"

Key = tuple[str, str, int, int, int, int]
Launched = tuple[int, int, int, int, int, int]  # block_m, block_n, block_k, splits, warps, stages


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate of one case.

    Attributes:
      launch: as in the table; None for the package's way by slabs and on Mosaic GPU.
      us: microseconds a call; None where it was not timed.
      bandwidth_share, rate_share, floor_share: of the measured ceilings; the floor's is of the larger.
      errors, reference_errors: of the candidate and of the bfloat16 reference against float32.
      refused: why it is no candidate.
    """

    case: str
    kind: str
    tokens: int
    rows: int
    launch: Launched | None
    us: float | None = None
    gb_per_s: float | None = None
    tflops: float | None = None
    bandwidth_share: float | None = None
    rate_share: float | None = None
    floor_share: float | None = None
    errors: Errors | None = None
    reference_errors: Errors | None = None
    host_bound: bool = False
    refused: str = ""


def run_cases(
    cases: Sequence[Case],
    ceilings: Ceilings,
    deadline: float,
    say: Callable[[str], None],
    *,
    save: Callable[[dict[Key, Launched], list[Row]], None] | None = None,
    interpret: bool = False,
    quick: bool = False,
) -> tuple[dict[Key, Launched], list[Row]]:
    """Half of the time until `deadline` (of time.monotonic) compiles; the rest checks and times, case after case.

    What is not compiled or not begun by then is left out, and `say` names it.

    Args:
      save: called after every case with what there is so far.

    Returns:
      (the best launch by key of the measured table, every measurement).
    """
    begin = time.monotonic()
    runs = [CaseRun(case, interpret=interpret, quick=quick) for case in cases]
    compiled = _compile_all(runs, begin + COMPILING * (deadline - begin), say)
    best: dict[Key, Launched] = {}
    rows: list[Row] = []
    for i, run in enumerate(runs):
        if time.monotonic() > deadline:
            say(f"left out for lack of time: {', '.join(run.case.name for run in runs[i:])}")
            break
        own = _measure(run, compiled[i], ceilings, deadline)
        compiled[i] = []  # an executable holds device memory
        rows += own
        chosen = _best(own)
        if chosen is not None and chosen.launch is not None and not run.by_slabs:  # else the table is not asked
            best[run.case.key] = chosen.launch
        say(f"{run.case.name}: {_summary(own, chosen)}")
        if save is not None:
            save(best, rows)
    return best, rows


def _compile_all(runs: Sequence[CaseRun], until: float, say: Callable[[str], None]) -> list[list[Any]]:
    """Of every launch of every case: an executable or a line. No thread is left when this returns."""
    threads = concurrent.futures.ThreadPoolExecutor(max(1, min(14, (os.cpu_count() or 2) - 1)))
    begin = time.monotonic()
    try:
        rest, tasks = [], []
        for run in runs if begin < until else ():
            rest.append(threads.submit(run.compile_rest))
            tasks.append([threads.submit(run.compile, launch) for launch in run.launches])
        waiting = {*rest, *(task for own in tasks for task in own)}
        total = len(waiting)
        while waiting and time.monotonic() < until:
            seconds = min(PROGRESS_SECONDS, max(until - time.monotonic(), 0))
            _, waiting = concurrent.futures.wait(waiting, seconds)
            say(f"compiled {total - len(waiting)} of {total} in {time.monotonic() - begin:.0f} s")
    finally:
        threads.shutdown(wait=True, cancel_futures=True)  # what runs must end: it would disturb the timing
    compiled = []
    for i, run in enumerate(runs):
        ready = bool(tasks) and not rest[i].cancelled()
        if ready:
            rest[i].result()
        compiled.append(
            [NOT_COMPILED if task.cancelled() else task.result() for task in tasks[i]]
            if ready
            else [NOT_COMPILED] * len(run.launches)
        )
    return compiled


def _measure(run: CaseRun, compiled: Sequence[Any], ceilings: Ceilings, deadline: float) -> list[Row]:
    case = run.case
    blank = [Row(case.name, case.kind, case.tokens, case.rows, table_launch(launch)) for launch in run.launches]
    if all(isinstance(executable, str) for executable in compiled):
        return [dataclasses.replace(row, refused=line) for row, line in zip(blank, compiled, strict=True)]
    sets = run.arguments()
    live = int(run.group_sizes[0].sum()) if run.group_sizes else case.rows
    truth = run.truth(*sets[0])
    reference_errors = measure_errors(run.reference(*sets[0]), truth, live)
    floor = sum(work.seconds(ceilings) for work in run.works) / len(run.works)
    rows = []
    for row, executable in zip(blank, compiled, strict=True):
        if isinstance(executable, str) or time.monotonic() > deadline:
            refused = executable if isinstance(executable, str) else "no time left"
            rows.append(dataclasses.replace(row, refused=refused))
            continue
        results = executable(tuple(sets[i % len(sets)] for i in range(run.calls)))
        errors = measure_errors(results[0], truth, live)
        excess = errors.excess(reference_errors)
        del results
        timed = timing.time_compiled(executable, sets, run.calls, repeats=3, rounds=run.rounds)
        seconds = timed.us * 1e-6
        rows.append(
            dataclasses.replace(
                row, us=timed.us, gb_per_s=run.bytes / seconds / 1e9, tflops=run.flops / seconds / 1e12,
                bandwidth_share=run.bytes / seconds / ceilings.copy_bytes_per_s,
                rate_share=run.flops / seconds / ceilings.matmul_flop_per_s, floor_share=floor / seconds,
                errors=errors, reference_errors=reference_errors, host_bound=timed.host_bound,
                refused=f"wrong: {excess}" if excess else "",
            )
        )  # fmt: skip
    return rows


def table_launch(launch: MatmulLaunch | None) -> Launched | None:
    """A launch as `measured_products` has it."""
    if launch is None:
        return None
    own = launch.launch
    return launch.block_m, launch.block_n, launch.block_k, launch.splits, own.num_warps, own.num_stages


def _best(rows: Sequence[Row]) -> Row | None:
    timed = [row for row in rows if row.us is not None and not row.refused and not row.host_bound]
    least = min((row.us for row in timed if row.us is not None), default=0.0)
    return next((row for row in timed if row.us is not None and row.us <= least * KEPT), None)


def _summary(rows: Sequence[Row], chosen: Row | None) -> str:
    if chosen is None:
        return next((row.refused for row in rows if row.refused), "the host is slower than the device")
    own = f"{rows[0].us:.1f} us" if rows[0].us is not None else rows[0].refused.split(":")[0]
    return (
        f"{chosen.us:.1f} us {chosen.launch or 'the way of the package'}, {chosen.gb_per_s:.0f} GB/s = "
        f"{chosen.bandwidth_share:.0%}, {chosen.tflops:.0f} TFLOP/s = {chosen.rate_share:.0%}, "
        f"{chosen.floor_share:.0%} of the floor; the package's own {own}"
    )
