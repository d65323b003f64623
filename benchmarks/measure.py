"""Runs the benchmark: orders the cases, compiles a wave of them on all cores, times them one after another."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import case_data, floors, ops, timing
from benchmarks.case_data import Pool, Queries
from benchmarks.cases import DECODE_OPS, HEADS, PREFILL_OPS, Baselines, Case, Heads, decode_cases, prefill_cases
from minimax_jax.rank_slice.ceilings import Ceilings

FAILED = "FAILED"  # how `Row.refused` starts after an error
WAVE = 8
POOL_BYTES = 45 << 30  # pools kept at a time
UNWEIGHTED_SHARE = 0.01  # how urgent a case of weight 0 is


@dataclasses.dataclass(frozen=True)
class Job:
    """One case on one device's heads; the index queries of each rho run through the same executables."""

    case: Case
    heads: Heads
    rhos: tuple[float, ...]
    ops: tuple[str, ...]
    cache_dtype: str = "bfloat16"

    @property
    def cached(self) -> int:
        """Bytes of a cached channel."""
        return jnp.dtype(self.cache_dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds. `us` is None where the implementation refused or failed."""

    phase: str
    op: str
    case: str
    short_name: str
    weight: int
    batch: int
    tokens: int
    longest: int
    tp: int
    rho: float | None
    us: float | None
    spread: float | None = None
    host_bound: bool = False
    calls: int = 0
    sets: int = 0
    vllm_us: float | None = None
    ratio: float | None = None
    floor_us: float = 0.0
    floor_share: float | None = None
    tflops: float | None = None
    union8: float | None = None
    vllm_union8: float | None = None
    refused: str = ""
    cache_dtype: str = "bfloat16"


def select_jobs(
    phases: Sequence[str],
    tps: Sequence[int],
    rhos: Sequence[float],
    only_ops: Sequence[str] = (),
    query_len: int = 1,
    max_cases: int | None = None,
    names: str = "",
    shrink: int = 1,
    cache_dtypes: Sequence[str] = ("bfloat16",),
) -> list[Job]:
    """The jobs asked for, most calls first; `max_cases` counts the cases of each phase.

    `shrink` divides all lengths, to try the harness where there is no GPU; such cases have no baseline. Each case is
    measured over caches of each of `cache_dtypes`, one after the other; selection, which reads none, once.
    """
    jobs = []
    for phase in phases:
        cases = prefill_cases() if phase == "prefill" else decode_cases(query_len)
        cases = tuple(case for case in cases if names in case.short_name or names in case.name)
        cases = tuple(case.shrunk(shrink) for case in cases)
        wanted = PREFILL_OPS if phase == "prefill" else DECODE_OPS
        wanted = tuple(op for op in wanted if not only_ops or op in only_ops)
        total = sum(case.weight for case in cases) or 1
        ordered = sorted(cases, key=lambda case: -(case.weight / total or UNWEIGHTED_SHARE))[:max_cases]
        for case in ordered:
            urgency = case.weight / total or UNWEIGHTED_SHARE
            own_rhos = tuple(rhos) if phase == "prefill" else (0.0,)
            jobs += [
                (urgency, Job(case, HEADS[tp], own_rhos, own_ops, dtype))
                for tp in tps
                for dtype in cache_dtypes
                if (own_ops := tuple(op for op in wanted if op != "select" or dtype == cache_dtypes[0]))
            ]
    return [job for _, job in sorted(jobs, key=lambda pair: -pair[0])]


def run_jobs(
    jobs: Sequence[Job],
    impl: str | None,
    baselines: Baselines,
    ceilings: Ceilings,
    deadline: float,
    say: Callable[[str], None],
    rotate: bool = True,
) -> tuple[list[Row], list[Job]]:
    """Measures jobs until `deadline` (of time.monotonic), beside the peer's `baselines`.

    Returns:
      The rows, and the jobs that were left out.
    """
    rows: list[Row] = []
    queries = queries_for(jobs)
    pools: dict[tuple[int, int, str], Pool] = {}
    done, slowest = 0, 0.0
    for wave in _waves(jobs):
        if time.monotonic() + slowest > deadline:
            break
        begin = time.monotonic()
        plans = [_Plan(job, baselines, rotate) for job in wave]
        _compile_all(plans, impl)
        say(f"compiled {sum(len(plan.compiled) for plan in plans)} executables in {time.monotonic() - begin:.0f} s")
        for plan in plans:
            if time.monotonic() > deadline:
                return rows, list(jobs[done:])
            pool = None  # a pool that makes room must not be held here
            pool = _pool(pools, plan.pages, plan.job)
            for rho in plan.job.rhos:
                try:
                    rows += _time_plan(plan, pool, queries[plan.job.heads], rho, ceilings)
                except jax.errors.JaxRuntimeError as error:  # in the inputs or in the selection
                    rows += [_row(plan, op, rho, ceilings, refused=_failure(error)) for op in plan.job.ops]
                say(_line(rows, plan.job, rho))
            done += 1
        slowest = max(slowest, time.monotonic() - begin)
    return rows, list(jobs[done:])


def queries_for(jobs: Sequence[Job]) -> dict[Heads, Queries]:
    """As many as the largest case of each needs."""
    most_tokens = {job.heads: max(other.case.tokens for other in jobs if other.heads == job.heads) for job in jobs}
    return {heads: Queries(heads, tokens) for heads, tokens in most_tokens.items()}


class _Plan:
    """A job with its sizes and executables."""

    def __init__(self, job: Job, baselines: Baselines, rotate: bool):
        self.job, self.baselines = job, baselines
        self.sets = case_data.sets_for(job.case, job.heads, job.cached) if rotate else 1
        self.pages = case_data.pool_pages(job.case, self.sets)
        self.compiled: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.rounds: dict[str, int] = {}

    def needed(self) -> tuple[str, ...]:
        """The ops to compile: attention needs a selection, and selection needs scores."""
        needed = set(self.job.ops)
        if "attention" in needed:
            needed |= {"index"} if "index" in needed else {"score", "select"}
        if "select" in needed:
            needed |= {"score"}
        return tuple(op for op in ("score", "select", "index", "attention", "chain") if op in needed)

    def compile(self, op: str, impl: str | None) -> None:
        case, heads = self.job.case, self.job.heads
        known = self.baselines.of(case, heads, self.job.rhos[0]).get(op)
        args, out = ops.shapes_of(op, case, heads, self.pages, self.job.cache_dtype)
        # attention of prefill sorts with CUB, which no CUDA graph takes; all else can be in one
        sorts = case.phase == "prefill" and op in ("attention", "chain")
        short = timing.SHORT_SECONDS if sorts else timing.GRAPH_SECONDS
        calls, rounds = timing.calls_and_rounds((known or 1000) * 1e-6, self.sets, short)
        self.calls[op], self.rounds[op] = calls, rounds
        try:
            compiled = timing.compile_calls(ops.function_of(op, impl), args, calls, out, rounds)
        except NotImplementedError as refusal:
            self.refused[op] = f"refused: {refusal}"
        except Exception as error:  # noqa: BLE001 a compiler's error must not lose the other cases
            self.refused[op] = _failure(error)
        if op in self.refused:
            if op not in ("score", "select", "index"):
                return
            compiled = timing.compile_calls(ops.function_of(op, "reference"), args, calls, out, rounds)
        self.compiled[op] = compiled


def _compile_all(plans: Sequence[_Plan], impl: str | None) -> None:
    workers = max(1, min(12, (os.cpu_count() or 2) - 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(plan.compile, op, impl) for plan in plans for op in plan.needed()]
        for task in tasks:
            task.result()


def _time_plan(plan: _Plan, pool: Pool, queries: Queries, rho: float, ceilings: Ceilings) -> list[Row]:
    job = plan.job
    inputs = case_data.make_inputs(job.case, pool, queries, rho, plan.sets)
    scores: list[Any] = [None] * len(inputs)
    selected: list[Any] = [None] * len(inputs)
    union = None
    rows = []
    for op in plan.needed():
        if op in plan.refused and op in job.ops:
            rows.append(_row(plan, op, rho, ceilings, refused=plan.refused[op]))
        if op not in plan.compiled:
            continue
        compiled, calls = plan.compiled[op], plan.calls[op]
        sets = [
            ops.arguments_of(op, own, pool, own_scores, own_selected)
            for own, own_scores, own_selected in zip(inputs, scores, selected, strict=True)
        ]
        if op == "score":
            scores = _outputs(compiled, sets, calls)
        elif op in ("select", "index"):
            selected = _outputs(compiled, sets, calls)
            if job.case.phase == "prefill" and job.case.tokens <= case_data.MOST_UNION_TOKENS:
                union = case_data.union_of_neighbours(np.asarray(selected[0]), job.case.query_lens)
        if op not in job.ops or op in plan.refused:
            continue
        out = jnp.full(inputs[0].q.shape, jnp.nan, jnp.bfloat16) if op in ops.TAKES_OUT else None
        try:
            timed = timing.time_compiled(compiled, sets, calls, out, rounds=plan.rounds[op])
        except jax.errors.JaxRuntimeError as error:
            rows.append(_row(plan, op, rho, ceilings, refused=_failure(error)))
            continue
        rows.append(_row(plan, op, rho, ceilings, timed, union))
    return rows


def _failure(error: Exception) -> str:
    """Long messages of compilers tell most at their end."""
    text = " ".join(str(error).split())
    return f"{FAILED} {type(error).__name__}: " + (text if len(text) <= 300 else f"{text[:140]} ... {text[-150:]}")


def _outputs(compiled: Callable[..., Any], sets: list[tuple], calls: int) -> list[Any]:
    """The result for each set."""
    results: list[Any] = []
    for start in range(0, len(sets), calls):
        group = sets[start : start + calls]
        padded = tuple(group[i % len(group)] for i in range(calls))
        results += compiled(padded)[: len(group)]
    return jax.block_until_ready(results)


def _row(
    plan: _Plan,
    op: str,
    rho: float,
    ceilings: Ceilings,
    timed: timing.Timing | None = None,
    union: float | None = None,
    refused: str = "",
) -> Row:
    job = plan.job
    case, heads = job.case, job.heads
    known = plan.baselines.of(case, heads, rho)
    floor = floors.floor_seconds(op, case, heads, ceilings, job.cached) * 1e6
    row = Row(
        phase=case.phase,
        op=op,
        case=case.name,
        short_name=case.short_name,
        weight=case.weight,
        batch=case.batch,
        tokens=case.tokens,
        longest=max(case.kv_lens),
        tp=heads.tp,
        rho=rho if case.phase == "prefill" else None,
        us=None,
        vllm_us=known.get(op),
        vllm_union8=known.get("union8"),
        floor_us=floor,
        union8=union,
        refused=refused,
        cache_dtype=job.cache_dtype,
    )
    if timed is None:
        return row
    flops = sum(floors.WORK[part](case, heads).flops for part in floors.PARTS[op])
    return dataclasses.replace(
        row,
        us=timed.us,
        spread=timed.spread,
        host_bound=timed.host_bound,
        calls=timed.calls,
        sets=plan.sets,
        ratio=known[op] / timed.us if op in known else None,
        floor_share=floor / timed.us,
        tflops=flops / timed.us / 1e6 if flops else None,
    )


def _pool(pools: dict[tuple[int, int, str], Pool], pages: int, job: Job) -> Pool:
    """A pool of that size, kept while there is room."""
    key = (pages, job.heads.tp, job.cache_dtype)
    if key not in pools:
        kept = sum(sum(cache.nbytes for cache in vars(pool).values()) for pool in pools.values())
        if kept + case_data.pool_bytes(pages, job.heads, job.cached) > POOL_BYTES:
            pools.clear()
        pools[key] = case_data.make_pool(pages, job.heads, dtype=job.cache_dtype)
    return pools[key]


def _waves(jobs: Sequence[Job]) -> Iterable[Sequence[Job]]:
    return (jobs[start : start + WAVE] for start in range(0, len(jobs), WAVE))


def _line(rows: Sequence[Row], job: Job, rho: float) -> str:
    own = [
        row
        for row in rows
        if row.case == job.case.name
        and row.tp == job.heads.tp
        and row.phase == job.case.phase
        and row.rho in (rho, None)
        and row.cache_dtype == job.cache_dtype
    ]
    label = f"{job.case.phase} {job.case.short_name} tp{job.heads.tp}"
    label += f" rho {rho}" if job.case.phase == "prefill" else ""
    label += "" if job.cache_dtype == "bfloat16" else f" {job.cache_dtype}"
    return f"{label}: " + ", ".join(
        f"{row.op} {row.refused.split()[0].rstrip(':')}"
        if row.us is None
        else f"{row.op} {row.us:.1f} us" + (f" {row.ratio:.2f}x" if row.ratio else "")
        for row in own
    )
