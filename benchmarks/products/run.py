"""Checks and times products with random weights: every candidate launch of every case."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.products.cases import LOCAL, PER_TOKEN, RANKS, Case, candidates
from benchmarks.products.weights import random_mxfp8
from minimax_jax.rank_slice.ceilings import Ceilings
from minimax_kernels import Swiglu
from minimax_kernels.grouped_matmul import reference as grouped_reference
from minimax_kernels.grouped_matmul.pallas_triton import multiply_groups
from minimax_kernels.matmul import pallas_triton, reference
from minimax_kernels.matmul_launches import MatmulLaunch

ACTIVATION = Swiglu(1.702, 1.0, 7.0)
CACHE_BYTES = 150e6  # what a rotation of inputs must exceed, for the second-level cache to be of no help
KEPT = 1.01  # of candidates within 1 % the first is taken
TOLERANCE = 2**-4  # of bfloat16 results, of several times their spread, against the reference's, in that spread
GROUP_SETS = 16  # choices of experts to rotate through
CHECKED_SETS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate of one case; microseconds, bytes and FLOPs a second, shares of the ceilings."""

    case: str
    kind: str
    tokens: int
    rows: int
    launch: tuple[int, ...]
    us: float | None
    gb_per_s: float | None = None
    tflops: float | None = None
    floor_share: float | None = None
    error: float | None = None
    host_bound: bool = False
    refused: str = ""


class _Job:
    def __init__(self, case: Case, interpret: bool, quick: bool):
        self.case, self.interpret = case, interpret
        self.launches = candidates(case)[: 1 if quick else None]
        # of experts, every set is another choice among the same weights; else the weights differ
        self.group_sizes = [] if case.kind == "matmul" else [_group_sizes(case, seed) for seed in range(GROUP_SETS)]
        works = [case.work(own.tolist()) for own in self.group_sizes] or [case.work()]
        self.bytes, self.flops = (
            sum(getattr(work, name) for work in works) / len(works) for name in ("bytes", "flops")
        )
        self.works = works
        self.sets = len(works) if self.group_sizes else max(2, math.ceil(CACHE_BYTES / self.bytes))
        if interpret:
            self.sets = min(self.sets, 2)
        expected = max(self.bytes / 2.5e12, self.flops / 4e14, 3e-6)
        self.calls, self.rounds = (1, 1) if interpret else timing.calls_and_rounds(expected, self.sets)
        self.compiled: list[Any] = []

    def arguments(self) -> list[tuple[Any, ...]]:
        """The sets to rotate through."""
        make = jax.jit(functools.partial(_arguments, self.case))
        if not self.group_sizes:
            return [make(jax.random.key(seed, impl="rbg")) for seed in range(self.sets)]
        x, weight, _, source = make(jax.random.key(0, impl="rbg"))
        return [(x, weight, jnp.asarray(own), source) for own in self.group_sizes[: self.sets]]

    def function(self, launch: MatmulLaunch) -> Callable[..., Any]:
        case = self.case
        if case.kind == "matmul":

            def multiply(x, *weights):
                return pallas_triton.matmul(x, weights, dtype=jnp.bfloat16, launch=launch, interpret=self.interpret)

            return multiply
        activation = ACTIVATION if case.kind == "joined" and launch.splits == 1 else None

        def groups(x, w, sizes, source):
            result = multiply_groups(
                x, w, sizes, launch=launch, interpret=self.interpret, activation=activation, expected_rows=case.rows,
                source=source if case.kind == "joined" else None,
            )  # fmt: skip
            if launch.splits > 1:
                result = result.sum(axis=0).astype(x.dtype)
                result = ACTIVATION.halves(result) if case.kind == "joined" else result
            return (result,)

        return groups

    def compile(self, index: int) -> Any:
        arguments = jax.eval_shape(functools.partial(_arguments, self.case), jax.random.key(0))
        try:
            return timing.compile_calls(self.function(self.launches[index]), arguments, self.calls, None, self.rounds)
        except Exception as error:  # noqa: BLE001 one launch that does not fit the device must not lose the others
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def run_cases(
    cases: Sequence[Case],
    ceilings: Ceilings,
    deadline: float,
    say: Callable[[str], None],
    *,
    interpret: bool = False,
    quick: bool = False,
) -> tuple[dict[tuple[str, str, int, int, int, int], tuple[int, ...]], list[Row]]:
    """Compiles all at once, then checks and times case after case until `deadline` (of time.monotonic).

    Returns:
      (the best launch by key of the measured table, every measurement).
    """
    jobs = [_Job(case, interpret, quick) for case in cases]
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    best: dict[tuple[str, str, int, int, int, int], tuple[int, ...]] = {}
    rows: list[Row] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        tasks = [[threads.submit(job.compile, i) for i in range(len(job.launches))] for job in jobs]
        for job, waiting in zip(jobs, tasks, strict=True):
            if time.monotonic() > deadline:
                say(f"left out for lack of time: {job.case.name} and what follows")
                for task in (task for waiting in tasks for task in waiting):
                    task.cancel()
                break
            job.compiled = [task.result() for task in waiting]
            own = _measure(job, ceilings)
            job.compiled = []
            rows += own
            timed = [row for row in own if row.us is not None and not row.refused and not row.host_bound]
            if not timed:
                say(f"{job.case.name}: {own[0].refused or 'the host is slower than the device'}")
                continue
            least = min(row.us for row in timed if row.us is not None)
            chosen = next(row for row in timed if row.us is not None and row.us <= least * KEPT)
            best[job.case.key] = chosen.launch
            first = f"{own[0].us:.1f} us" if own[0].us is not None else own[0].refused.split(":")[0]
            say(
                f"{job.case.name}: {chosen.us:.1f} us {chosen.launch}, {chosen.gb_per_s:.0f} GB/s, "
                f"{chosen.tflops:.0f} TFLOP/s, {chosen.floor_share:.0%} of the floor; the formula's {first}"
            )
    return best, rows


def _arguments(case: Case, key: jax.Array, group_sizes: jax.Array | None = None) -> tuple[Any, ...]:
    """Random rows and weights, as the function of the case takes them."""
    rows_key, *keys = jax.random.split(key, 1 + len(case.widths))
    lead = () if case.kind == "matmul" else (LOCAL,)
    weights = tuple(
        _weight(own, (*lead, case.inputs, width), case.weights) for own, width in zip(keys, case.widths, strict=True)
    )
    rows = case.all_rows if case.kind == "groups" else case.tokens
    x = jax.random.normal(rows_key, (rows, case.inputs), jnp.bfloat16)
    if case.kind == "matmul":
        return (x, *weights)
    sizes = jnp.zeros((LOCAL,), jnp.int32) if group_sizes is None else group_sizes
    source = jax.random.permutation(rows_key, case.all_rows).astype(jnp.int32) // PER_TOKEN
    return x, weights[0], sizes, source


def _weight(key: jax.Array, shape: tuple[int, ...], weights: str) -> Any:
    return random_mxfp8(key, shape) if weights == "mxfp8" else jax.random.normal(key, shape, jnp.bfloat16)


def _group_sizes(case: Case, seed: int) -> np.ndarray:
    """This rank's pairs of tokens that choose four different experts each, all alike."""
    random = np.random.default_rng(seed)
    chosen = np.argsort(random.random((case.tokens, LOCAL * RANKS)), axis=1)[:, :PER_TOKEN]
    sizes = np.bincount(chosen[chosen < LOCAL], minlength=LOCAL)
    if sizes.sum() == 0:
        sizes[0] = 1  # a step without work here would measure nothing
    return sizes.astype(np.int32)


def _measure(job: _Job, ceilings: Ceilings) -> list[Row]:
    case, sets = job.case, job.arguments()
    floor = sum(work.seconds(ceilings) for work in job.works) / len(job.works)
    checked = min(CHECKED_SETS, job.calls, len(sets))
    reference_of = jax.jit(functools.partial(_expected, case))
    expected = [reference_of(*own) for own in sets[:checked]]
    live = [int(own.sum()) for own in job.group_sizes] or [case.rows] * checked
    rows = []
    for launch, compiled in zip(job.launches, job.compiled, strict=True):
        shown = (*dataclasses.astuple(launch)[:4], launch.launch.num_warps, launch.launch.num_stages)
        row = Row(case.name, case.kind, case.tokens, case.rows, shown, None)
        if isinstance(compiled, str):
            rows.append(dataclasses.replace(row, refused=compiled))
            continue
        results = compiled(tuple(sets[i % len(sets)] for i in range(job.calls)))
        error = float(max(map(_error, live, results, expected)))
        timed = timing.time_compiled(compiled, sets, job.calls, repeats=3, rounds=job.rounds)
        us = timed.us
        rows.append(
            dataclasses.replace(
                row, us=us, gb_per_s=job.bytes / us / 1e3, tflops=job.flops / us / 1e6, floor_share=floor * 1e6 / us,
                error=error, host_bound=timed.host_bound,
                refused="" if error <= TOLERANCE else f"wrong: {error:.3g} of the spread",
            )
        )  # fmt: skip
    return rows


def _expected(case: Case, x: jax.Array, *rest: Any) -> tuple[jax.Array, ...]:
    if case.kind == "matmul":
        return reference.matmul(x, rest, dtype=jnp.bfloat16)
    weight, sizes, source = rest
    result = grouped_reference.grouped_matmul(x[source] if case.kind == "joined" else x, weight, sizes)
    return (ACTIVATION.halves(result) if case.kind == "joined" else result,)


def _error(live: int, found: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> float:
    """The largest difference in the first `live` rows, in the spread of what is expected; infinite for a NaN."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        wide, other = ours[:live].astype(jnp.float32), theirs[:live].astype(jnp.float32)
        error = float(jnp.max(jnp.abs(wide - other)) / jnp.maximum(jnp.std(other), 1e-6)) if live else 0.0
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
