"""The engine's steps over one rank's slice: weights, random pages, requests in the middle of their lives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.cache import PageAllocator, PagePool, SequencePages
from minimax_jax.engine.launched_step import LaunchedStep
from minimax_jax.engine.runner_config import RunnerConfig
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.scheduler import PlannedRow, StepPlan
from minimax_jax.engine.sequence import Sequence as Row
from minimax_jax.engine.step_runner import StepRunner
from minimax_jax.engine.steps import Steps
from minimax_jax.model import abstract_model, split_model
from minimax_jax.parallel import Layout
from minimax_jax.parallel.config import EXPERTS, TOKENS
from minimax_jax.rank_slice.cases import DECODE, PREFILL, Case, Launching
from minimax_jax.rank_slice.comm import SliceComm
from minimax_jax.rank_slice.compiling import Compiler
from minimax_jax.rank_slice.decode_programs import DecodePrograms
from minimax_jax.rank_slice.float_copies import float_copies
from minimax_jax.tensor_table import cache_bytes_per_token
from minimax_kernels import Mxfp8

_MEMORY_SHARE = 0.97
_RESERVE = 6 << 30  # bytes for what a chunk of 8192 tokens holds between its kernels


class SliceEngine:
    """One rank's engine without the other ranks, for a set of cases.

    Attributes:
      runner: as the engine has it; pool: its pages.
      page_size: tokens a page.
      programs: of decode steps.
      bad_steps: whose hidden states were no numbers.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        state: Mapping[str, Any],
        cases: Sequence[Case],
        *,
        dtype: DTypeLike,
        cache_dtype: DTypeLike,
        most_steps: int,
        seed: int = 0,
    ):
        """
        Args:
          layout: of the whole model; rank: whose slice it is.
          state: its weights, as `draw_weights` gives them.
          cases: that will run.
          dtype: of hidden states; cache_dtype: of pages.
          most_steps: decode steps of one case at most.
        """
        config, parallel = layout.config, layout.parallel
        local = layout.local_config
        self._layout, self._config, self._most_steps = layout, config, most_steps
        self._random, self._seed, self.bad_steps = np.random.default_rng(seed), seed, 0
        self.page_size = config.index_block_size
        graphdef, _ = split_model(abstract_model(local, dtype))
        comm = SliceComm(
            layout.place(TOKENS, rank), parallel.size(TOKENS), layout.experts_per_rank, layout.place(EXPERTS, rank)
        )
        self._leaves = list(state.values())
        self._steps = Steps(local, graphdef, tuple(state), comm=comm)
        self.programs = DecodePrograms(self._steps, next(iter(self._leaves[0].devices())).platform)
        self._compiler = Compiler()
        self._batch = max((case.batch for case in cases), default=1)
        self.pool = PagePool(local, self._num_pages(cases, cache_dtype), cache_dtype, self._leaves[0].sharding)
        _fill(self.pool, seed)
        chunks = sorted({case.query_len for case in cases if case.kind == PREFILL}) or [self.page_size]
        widths = tuple(sorted({self._pages(case) for case in cases}))
        self.runner = StepRunner(
            self._steps,
            self._leaves,
            config,
            self.pool,
            RunnerConfig(
                self._batch,
                "segmented",  # for chunks; decode steps are one executable
                batch_sizes=tuple(sorted({case.batch for case in cases})),
                token_buckets=tuple(chunks),
                page_buckets=widths,
            ),
            max_pages=max(widths),
            segmented=self._steps.segments(tuple(chunks), (1,), widths),
        )
        self.programs.attach(self.runner)

    def compile(
        self, cases: Sequence[Case], launchings: Sequence[Launching], say: Callable[[str], None], *, seconds: float
    ) -> dict[tuple[Case, Launching], dict[str, Any]]:
        """Compiles the decode steps side by side; chunks compile when they first run.

        Args:
          say: told of each that is done.
          seconds: how long to wait for them.

        Returns:
          of each case and launching that was done in time "temporaries", bytes that the step takes beside its
          arguments, and "float_copies", how many copies of quantised weights in floats it writes, None without such
          weights; or "error", why it does not compile.
        """
        shapes = {leaf.shape for leaf in self._leaves if isinstance(leaf, Mxfp8)}
        plain = [leaf for leaf in self._leaves if not isinstance(leaf, Mxfp8)]
        floats = {leaf.shape for leaf in (*plain, *jax.tree.leaves(self.pool.caches))}
        found: dict[tuple[Case, Launching], dict[str, Any]] = {}
        tasks = {}
        for case in cases:
            if case.kind == DECODE:
                plan, widths = self.requests(case).next_launch(), self._widths(case)
                for launching in launchings:
                    given = launching, self._leaves, self.runner, plan, case.batch, widths
                    tasks[case, launching] = functools.partial(self.programs.compile, *given)
        for (case, launching), done in self._compiler.run(tasks, seconds):
            try:
                compiled = done.result()
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # the others can still run
                found[case, launching] = {"error": " ".join(str(error).split())[:500]}
                continue
            memory = compiled.memory_analysis()
            found[case, launching] = {
                "temporaries": None if memory is None else int(memory.temp_size_in_bytes),
                "float_copies": (
                    len(float_copies(compiled.as_text(), shapes, floats | self._activations(case))) if shapes else None
                ),
            }
            say(f"compiled {case.name}, {launching.name}")
        return found

    @property
    def compiling(self) -> int:
        """How many executables still compile although nobody waits for them: the host is not quiet."""
        return self._compiler.compiling

    def recover(self) -> None:
        """Fresh pages and rows, after a step that failed has taken the old ones with it."""
        self.pool.resize(self.pool.num_pages, keep=False)
        self.runner.reset_rows()
        _fill(self.pool, self._seed)

    def requests(self, case: Case) -> Requests:
        """Requests of that kind, with pages of their own as far as the pool goes."""
        return Requests(self, case)

    def run(self, requests: Requests, count: int, steps: int = 1) -> None:
        """Runs launches as the engine's loop does: the next one is made before the last one is read.

        Args:
          steps: of each launch.
        """
        before: LaunchedStep | None = None
        for _ in range(count):
            launched = self.runner.launch([requests.next_launch(steps)])
            self._read(before)
            before = launched
        self._read(before)

    def distinct_share(self, case: Case) -> float:
        """Of the pages that a step's requests have, those that no other request has as well."""
        pages = case.batch * self._pages(case)
        return min(1.0, self.pool.num_pages / pages)

    def tables(self, case: Case) -> list[list[int]]:
        """Block tables: pages that are written are a request's own, and so are all others while there are enough."""
        first = case.context // self.page_size
        body, tail = first, self._pages(case) - first
        own = case.batch * tail
        shared = max(1, self.pool.num_pages - own)
        return [
            [own + (row * body + page) % shared for page in range(body)] + list(range(row * tail, (row + 1) * tail))
            for row in range(case.batch)
        ]

    def tokens(self, count: int) -> np.ndarray:
        """Random ids."""
        return self._random.integers(0, self._config.vocab_size, count).astype(np.int32)

    @property
    def cache_itemsize(self) -> int:
        """Bytes of a cached number."""
        return int(self.pool.caches.k[0].dtype.itemsize)

    @property
    def page_bytes(self) -> int:
        """Of a page in all layers."""
        return self.page_size * cache_bytes_per_token(self._layout.local_config, itemsize=self.cache_itemsize)

    def _read(self, step: LaunchedStep | None) -> None:
        if step is None:
            return
        tokens, _ = self.runner.fetch(step)
        self.bad_steps += bool((tokens[:, : len(step.plans[0].rows)] < 0).any())

    def _pages(self, case: Case) -> int:
        """Of one request, those that its steps write to included."""
        new = case.query_len if case.kind == PREFILL else self._most_steps
        return -(-(case.context + new) // self.page_size)

    def _widths(self, case: Case) -> list[int]:
        """Of the block tables that its steps come with: pages of all cases are the sizes to round up to."""
        first = -(-(case.context + case.query_len) // self.page_size)
        return sorted({self.runner.config.pages(count) for count in range(first, self._pages(case) + 1)})

    def _num_pages(self, cases: Sequence[Case], cache_dtype: DTypeLike) -> int:
        wanted = max(case.batch * self._pages(case) for case in cases)
        memory = self._leaves[0].addressable_shards[0].device.memory_stats()
        if memory is None:
            return wanted
        itemsize = jnp.dtype(cache_dtype).itemsize
        page = self.page_size * cache_bytes_per_token(self._layout.local_config, itemsize=itemsize)
        room = int((_MEMORY_SHARE * memory["bytes_limit"] - memory["bytes_in_use"] - _RESERVE) // page)
        least = max(self._pages(case) + (case.batch - 1) * 3 for case in cases)
        if room < least:
            raise ValueError(
                f"--context, --batch: need at least {least * page / 1e9:.1f} GB of pages, there is room for "
                f"{max(0, room) * page / 1e9:.1f} GB beside the weights: must be smaller"
            )
        return min(wanted, room)

    def _activations(self, case: Case) -> set[tuple[int, int]]:
        """Of a decode step; some are as large as a weight: 64 tokens' 256 results of experts as k_proj and v_proj."""
        config, choices = self._layout.local_config, self._config.num_experts_per_tok
        widths = (config.hidden_size, config.intermediate_size, 2 * config.intermediate_size)
        return {(case.batch * each, width) for each in (1, choices) for width in widths}


class Requests:
    """The rows of one case, and the plans of its steps."""

    def __init__(self, engine: SliceEngine, case: Case):
        self.case = case
        self._steps = 0
        params = SamplingParams(max_tokens=engine._most_steps, temperature=0, ignore_eos=True, detokenize=False)
        allocator = PageAllocator(engine.pool.num_pages, reuse=False)
        self._rows = []
        for number, table in enumerate(engine.tables(case)):
            prompt = engine.tokens(case.context + case.query_len)
            row = Row(prompt, params, order=(number, 0), max_new=engine._most_steps)
            row.pages, row.slot = SequencePages(allocator, engine.page_size), number
            row.pages.table = table
            self._rows.append(row)

    def next_launch(self, steps: int = 1) -> StepPlan:
        """Decoding goes on by `steps` tokens a request; a chunk is computed again."""
        start = self.case.context + (self._steps if self.case.kind == DECODE else 0)
        rows = tuple(PlannedRow(row, start, self.case.query_len, steps, self._steps == 0) for row in self._rows)
        self._steps += steps
        return StepPlan(rows, num_steps=steps)


def _fill(pool: PagePool, seed: int) -> None:
    """Random numbers on all pages, a layer at a time and in place."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(pool.caches.k))
    for layer, key in enumerate(keys):
        with pool.borrow_layer(layer, pool.epoch.value) as lent:
            held = {"k": lent.k, "v": lent.v} if lent.index is None else {"k": lent.k, "v": lent.v, "index": lent.index}
            filled = _noise(held, key)
            lent.k, lent.v, lent.index = filled["k"], filled["v"], filled.get("index")


@functools.partial(jax.jit, donate_argnums=0)
def _noise(pages: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, len(pages))
    return {
        name: jax.random.normal(own, array.shape, jnp.bfloat16).astype(array.dtype)
        for own, (name, array) in zip(keys, pages.items(), strict=True)
    }
