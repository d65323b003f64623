"""Measures launch parameters of sparse attention by shape, and writes the table that the kernels look them up in."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import case_data, ops, timing
from benchmarks.case_data import Queries
from benchmarks.cases import BLOCK, HEADS, TOPK, Case, Heads
from benchmarks.machine import describe_machine
from benchmarks.ops import SCALE
from minimax_kernels import FP8, measured_launches
from minimax_kernels.launch_table import AttendLaunch, page_launch
from minimax_kernels.paged_softmax import Selection, attend_pages
from minimax_kernels.sparse_attention.by_page import attend_by_page
from minimax_kernels.triton_call import Launch, next_power_of_two

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEW_TOKENS = (32, 128, 512)
MANY_TOKENS = (512, 2048, 8192)
CONTEXT = 32_768
MOST_CACHED = 1 << 21  # tokens of context in all: caches of 8 bits stay below the 2 GiB that kernels take
TABLE = Path("kernels/minimax_kernels/measured_launches.py")
Tables = dict[str, dict[tuple[int, int], tuple[int, ...]]]
TABLES = {
    "attend_decode": "one token a request: (programs a token and group, keys a step, warps, stages)",
    "attend_decode_fp8": "the same over caches of 8 bits",
    "attend_few": "few tokens of prompts, as above",
    "page": "page by page: (tiles of 64 rows a program, warps)",
}
KEPT = 1.01  # of candidates within 1 % the first is taken: fewer partial results, smaller programs


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a launch is chosen for.

    Attributes:
      kind: "decode", "fp8" (decode over caches of 8 bits), "few" (tokens of a prompt, each with its own programs) or
        "page" (page by page).
      tp: 1 or 8, whose heads; tokens: in all.
    """

    kind: str
    tp: int
    tokens: int

    @property
    def table(self) -> str:
        """Where its launch is kept."""
        return {"page": "page", "few": "attend_few", "fp8": "attend_decode_fp8"}.get(self.kind, "attend_decode")

    @property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """Launches to measure; of decode those that fill the device, or come nearest to it, without many turns."""
        if self.kind in ("page", "few"):
            return PAGES if self.kind == "page" else ATTEND
        programs = self.tokens * self.heads.kv
        all_of_kind = ATTEND_FP8 if self.kind == "fp8" else ATTEND
        return tuple(c for c in all_of_kind if programs * c[0] <= 1100 and (programs * c[0] >= 100 or c[0] >= 8))

    @property
    def cache_dtype(self) -> str:
        """Of keys and values."""
        return FP8 if self.kind == "fp8" else "bfloat16"

    @property
    def heads(self) -> Heads:
        """Of this rank."""
        return HEADS[self.tp]

    @property
    def case(self) -> Case:
        """One token for each of `tokens` requests, or `tokens` of one request, at the end of their contexts."""
        if self.kind in ("decode", "fp8"):
            context = min(CONTEXT, MOST_CACHED // self.tokens)
            return Case("decode", f"tune {self.tokens}", 1, (1,) * self.tokens, (context - 1,) * self.tokens)
        return Case("prefill", f"tune {self.tokens}", 1, (self.tokens,), (CONTEXT - self.tokens,))

    @property
    def key(self) -> tuple[int, int]:
        """(query heads a group, programs rounded up to a power of two; for pages, tiles of 64 rows)."""
        rows = self.heads.q // self.heads.kv
        programs = self.tokens * self.heads.kv
        return rows, next_power_of_two(programs * TOPK * rows // 64 if self.kind == "page" else programs)


# (splits, keys a step, warps, stages) where programs walk lists of pages; (tiles a program, warps) page by page.
# More warps are slower, as are 128 keys of bfloat16 and a fourth stage (docs/kernels.md).
ATTEND = (
    *((splits, 64, 4, 3) for splits in (1, 2, 3, 4, 6, 8)),
    (1, 64, 4, 2), (4, 64, 4, 2), (8, 64, 4, 2), (16, 128, 4, 1),
)  # fmt: skip
ATTEND_FP8 = (
    *((splits, keys, 4, 3) for splits in (1, 2, 4) for keys in (64, 128)),
    (3, 128, 4, 3), (8, 64, 4, 3), (8, 128, 4, 2), (16, 128, 4, 1),
)  # fmt: skip
PAGES = tuple((tiles, 4) for tiles in (1, 4, 8, 16, 32))


def shapes(kinds: Sequence[str], quick: bool, only: Sequence[int] = ()) -> list[Shape]:
    """The shapes to measure; `quick`: two a kind; `only`: those of so many tokens."""
    tokens = {"decode": DECODE_TOKENS, "fp8": DECODE_TOKENS, "few": FEW_TOKENS, "page": MANY_TOKENS}
    return [
        Shape(kind, tp, count)
        for kind in kinds
        for tp in HEADS
        for count in (tokens[kind][:2] if quick else tokens[kind])
        if not only or count in only
    ]


class _Job:
    """A shape with its inputs' sizes and the executables of its candidates."""

    def __init__(self, shape: Shape, shrink: int, interpret: bool):
        self.shape, self.interpret = shape, interpret
        self.case = shape.case.shrunk(shrink)
        cached = jnp.dtype(shape.cache_dtype).itemsize
        self.sets = 1 if shape.kind == "page" else case_data.sets_for(self.case, shape.heads, cached)
        self.pages = case_data.pool_pages(self.case, self.sets)
        expected = 100e-6 if shape.kind == "page" else 20e-6 * max(1, shape.tokens * shape.heads.kv / 256)
        self.calls, self.rounds = (1, 1) if interpret else timing.calls_and_rounds(expected, self.sets)
        self.compiled: list[Any] = []

    def build(self, candidate: tuple[int, ...]) -> Any:
        """Compiles a candidate."""
        args, out = ops.shapes_of("attention", self.case, self.shape.heads, self.pages, self.shape.cache_dtype)
        run = _run_page if self.shape.kind == "page" else _run_list
        function = functools.partial(run, candidate, self.shape, self.interpret)
        return timing.compile_calls(lambda *args, out: function(*args, out), args, self.calls, out, self.rounds)

    def times(self) -> list[float]:
        """Microseconds of each candidate."""
        heads, case = self.shape.heads, self.case
        pool = case_data.make_pool(self.pages, heads, dtype=self.shape.cache_dtype)
        inputs = case_data.make_inputs(case, pool, Queries(heads, case.tokens), 0.0, self.sets)
        sets = [
            (own.q, pool.k_cache, pool.v_cache, jnp.asarray(_selection(case, heads, seed)), own.batch)
            for seed, own in enumerate(inputs)
        ]
        return [
            timing.time_compiled(one, sets, self.calls, jnp.zeros_like(sets[0][0]), rounds=self.rounds).us
            for one in self.compiled
        ]


def run_tuning(
    todo: Sequence[Shape],
    deadline: float,
    say: Callable[[str], None],
    *,
    shrink: int = 1,
    interpret: bool = False,
) -> tuple[Tables, list[dict[str, Any]]]:
    """Measures candidates.

    Args:
      deadline: of time.monotonic, after which no shape is begun.
      shrink: divides the lengths (a try without a GPU, in the interpreter).

    Returns:
      (the best by kind and key, every measurement).
    """
    best: Tables = {name: {} for name in TABLES}
    measured: list[dict[str, Any]] = []
    jobs = [_Job(shape, shrink, interpret) for shape in todo]
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:  # compiling is most of the time
        waiting = [[threads.submit(job.build, candidate) for candidate in job.shape.candidates] for job in jobs]
        for job, tasks in zip(jobs, waiting, strict=True):
            job.compiled = [task.result() for task in tasks]
    say("compiled")
    for job in jobs:
        if time.monotonic() > deadline:
            say(f"left out for lack of time: {job.shape} and what follows")
            break
        shape, times = job.shape, job.times()
        job.compiled.clear()
        least = min(times)
        chosen = next(c for c, us in zip(shape.candidates, times, strict=True) if us <= least * KEPT)
        best[shape.table][shape.key] = chosen
        measured += [
            {**dataclasses.asdict(shape), "launch": launch, "us": us}
            for launch, us in zip(shape.candidates, times, strict=True)
        ]
        say(f"{shape.kind} tp{shape.tp} {shape.tokens} tokens: {chosen} {least:.1f} us (slowest {max(times):.1f})")
    return best, measured


def _selection(case: Case, heads: Heads, seed: int) -> np.ndarray:
    """Random blocks, distinct and in the past of each token; -1 where there are fewer than topk."""
    random = np.random.default_rng(seed)
    blocks = min(case.prefix_lens) // BLOCK + 1
    order = np.argsort(random.random((heads.kv, case.tokens, blocks)), axis=-1)[..., :TOPK].astype(np.int32)
    return np.pad(order, ((0, 0), (0, 0), (0, TOPK - order.shape[-1])), constant_values=-1)


def _run_list(candidate, shape: Shape, interpret: bool, q, k_cache, v_cache, selected, batch, out):
    splits, keys, warps, stages = candidate
    launch = AttendLaunch(1, -(-TOPK // splits), keys, Launch(warps, stages))
    return attend_pages(
        q, k_cache, v_cache, batch, groups=shape.heads.kv, selection=Selection(TOPK, blocks=selected), scale=SCALE,
        out=out, launch=launch, interpret=interpret,
    )  # fmt: skip


def _run_page(candidate, shape: Shape, interpret: bool, q, k_cache, v_cache, selected, batch, out):
    tiles, warps = candidate
    heads = shape.heads
    rows = heads.q // heads.kv
    formula = page_launch(q.shape[0], rows, heads.kv, TOPK)
    launch = dataclasses.replace(formula, pairs_per_program=64 // rows * tiles, launch=Launch(warps, 1))
    return attend_by_page(
        q, k_cache, v_cache, selected, batch, scale=SCALE, out=out, launch=launch, interpret=interpret
    )


def table_text(best: Tables) -> str:
    """The Python file of the table: what the package holds, with these in their places."""
    machine = describe_machine()
    held = {name: getattr(measured_launches, name.upper()) for name in TABLES}
    lines = [
        '"""Launch parameters by shape, written by scripts/tune.py: change it there.',
        "",
        f"Latest on {machine['device']}, driver {machine['driver']}, jax {machine['jax']}, {machine['date']}; D 128,",
        f"pages of {BLOCK}, topk {TOPK}, up to {CONTEXT} tokens of context. Keys are (query heads a group, size):",
        "of tokens x groups, or for PAGE of tiles of 64 rows, a power of two.",
        '"""',
        "",
        "Table = dict[tuple[int, int], tuple[int, ...]]",
        "",
    ]
    for name, note in TABLES.items():
        rows = [f"    {key}: {value}," for key, value in sorted({**held[name], **best[name]}.items())]
        body = ["{", *rows, "}"] if rows else ["{}"]
        lines += [f"# {note}", f"{name.upper()}: Table = {body[0]}", *body[1:], ""]
    return "\n".join(lines).rstrip() + "\n"
