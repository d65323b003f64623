"""Generation for a fixed batch of prompts over paged caches: prefill in chunks, then decode."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.attention import check_pages, step_layout
from minimax_jax.buckets import bucket
from minimax_jax.cache import LentCaches, PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.execution import check_execution, mesh_execution, prefill_execution
from minimax_jax.engine.generation_config import GenerationConfig
from minimax_jax.engine.sampler import SamplingState, sampling_specs, sampling_state
from minimax_jax.engine.segmented_prefill import LEAST_BUCKET, FlatStep
from minimax_jax.engine.steps import MAX_PREFILL_TOKENS, DecodeState, Steps
from minimax_kernels import Batch


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Prompt tokens of one prefill step: (request, first token, end) for each request that takes part."""

    parts: tuple[tuple[int, int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(end - start for _, start, end in self.parts)


def prefill_chunks(lengths: list[int], most: int) -> list[_Chunk]:
    """Cuts prompts, in order, into steps of at most `most` tokens."""
    chunks: list[_Chunk] = []
    parts: list[tuple[int, int, int]] = []
    room = most
    for request, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            parts.append((request, start, end))
            room -= end - start
            start = end
            if room == 0:
                chunks.append(_Chunk(tuple(parts)))
                parts, room = [], most
    return chunks + ([_Chunk(tuple(parts))] if parts else [])


def group_chunks(lengths: list[int], in_group: int, groups: int, most: int) -> list[tuple[_Chunk, ...]]:
    """The same for data ranks of `in_group` requests each: one chunk a rank and step, empty where one is done."""
    each = []
    for first in range(0, in_group * groups, in_group):
        chunks = prefill_chunks(lengths[first : first + in_group], most)
        each.append([_Chunk(tuple((first + r, start, end) for r, start, end in chunk.parts)) for chunk in chunks])
    return list(itertools.zip_longest(*each, fillvalue=_Chunk(())))


def block_tables(pages_of: list[int], rows: int, groups: int = 1) -> np.ndarray:
    """[rows, N] tables in which each request owns pages of its own; entries without a page name page 0.

    Each of `groups` groups of rows counts its pages from 0.
    """
    tables = np.zeros((rows, bucket(max(pages_of))), np.int32)
    first = 0
    for request, pages in enumerate(pages_of):
        if request % (rows // groups) == 0:
            first = 0
        tables[request, :pages] = np.arange(first, first + pages)
        first += pages
    return tables


def generate_tokens(
    steps: Steps,
    leaves: list[jax.Array],
    config: MiniMaxM3Config,
    prompts: list[np.ndarray],
    options: GenerationConfig,
    *,
    max_new_tokens: int,
    seed: int,
    cache_dtype: DTypeLike,
    max_prefill_tokens: int = MAX_PREFILL_TOKENS,
    execution: str = "auto",
    pool: PagePool | None = None,
) -> Iterator[np.ndarray]:
    """Yields the new tokens [R] of every step, at most `max_new_tokens` times.

    The step after the one that is yielded already runs on the device meanwhile. A row goes on after its
    end-of-text token; the caller decides when to stop.

    Args:
      execution: "segmented" runs prefill as segments around host-side attention and decode as one executable;
        "whole" runs both as one executable each; "eager" runs both as segments at their exact sizes; "auto"
        chooses the faster of the first two for each step.
      pool: pages to use, at least as many as the sequences need; it may be resized between tokens, though not
        below what the tables name (ValueError at the next step). None for one of its own, freed at the end.

    Raises:
      ValueError: at once, for an unknown execution or fewer than one new token; at the first token, if the pool is
        too small.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    return _generated(
        steps,
        leaves,
        config,
        prompts,
        options,
        max_new_tokens=max_new_tokens,
        seed=seed,
        cache_dtype=cache_dtype,
        max_prefill_tokens=max_prefill_tokens,
        execution=check_execution(execution),
        pool=pool,
    )


def _generated(
    steps: Steps,
    leaves: list[jax.Array],
    config: MiniMaxM3Config,
    prompts: list[np.ndarray],
    options: GenerationConfig,
    *,
    max_new_tokens: int,
    seed: int,
    cache_dtype: DTypeLike,
    max_prefill_tokens: int,
    execution: str,
    pool: PagePool | None,
) -> Iterator[np.ndarray]:
    """The generator behind `generate_tokens`, whose arguments were checked."""
    num_rows = len(prompts)
    groups = 1 if steps.ranks is None else steps.ranks.groups
    in_group = bucket(-(-num_rows // groups))  # requests go to data ranks in order, so that live rows are first in each
    rows = in_group * groups
    block_size = config.index_block_size
    # the last token is never written, so the longest context is one shorter than all tokens
    pages_of = [-(-(len(p) + max_new_tokens - 1) // block_size) for p in prompts]
    tables = block_tables(pages_of, rows, groups)
    needed = max(sum(pages_of[first : first + in_group]) for first in range(0, num_rows, in_group))
    place = leaves[0].sharding if steps.ranks is None else steps.ranks.cache_placement
    held = PagePool(config, bucket(needed), cache_dtype, place) if pool is None else pool
    if held.num_pages < needed:
        raise ValueError(f"pool has {held.num_pages} pages: must have at least {needed} for these sequences")
    sampling = sampling_state(seed, rows, options.temperature, options.top_p, options.top_k, config.vocab_size)
    if steps.ranks is not None:
        execution = mesh_execution(execution)
        sampling = steps.ranks.place(sampling, sampling_specs(steps.ranks.rows))
    run = _Run(steps, leaves, held, tables, block_size, sampling, options, execution)
    try:
        first = np.zeros(rows, np.int32)
        for chunks in group_chunks([len(p) for p in prompts], in_group, groups, max_prefill_tokens):
            picked = run.fetch(run.prefill(chunks, prompts))
            for request, _, end in (part for chunk in chunks for part in chunk.parts):
                if end == len(prompts[request]):
                    first[request] = picked[request]
        kv_lens = np.zeros(rows, np.int32)
        kv_lens[:num_rows] = [len(p) for p in prompts]
        yield first[:num_rows]  # at once: the first decode step may have to be compiled
        decode = run.decode_eagerly if execution == "eager" else run.decode
        pending: np.ndarray | None = None
        for tokens in decode(first, kv_lens, num_rows, max_new_tokens - 1):
            if pending is not None:
                yield pending  # while the device works on the next token
            pending = run.fetch(tokens)[:num_rows]
        if pending is not None:
            yield pending
    finally:
        if pool is None:
            held.release()


class _Run:
    """One call's constants, and its steps."""

    def __init__(
        self,
        steps: Steps,
        leaves: list[jax.Array],
        pool: PagePool,
        tables: np.ndarray,
        block_size: int,
        sampling: SamplingState,
        options: GenerationConfig,
        execution: str,
    ):
        self._steps, self._leaves, self._pool = steps, leaves, pool
        self._tables, self._block_size = tables, block_size
        self._checked_life: int | None = None  # of the pool, in which the tables were found to fit
        self._sampling, self._execution = sampling, execution
        self._greedy, self._truncated = options.greedy, options.top_k > 0 or options.top_p < 1
        self._num_layers = len(pool.caches.k)
        self._platform = next(iter(leaves[0].devices())).platform

    def prefill(self, chunks: tuple[_Chunk, ...], prompts: list[np.ndarray]) -> jax.Array:
        """One prefill step, of a chunk a data rank; returns the token after each request's part of it."""
        steps = [self._flat_step(chunk, group, len(chunks), prompts) for group, chunk in enumerate(chunks)]
        most = max(chunk.num_tokens for chunk in chunks)
        how = prefill_execution(self._execution, most, self._num_layers, self._platform)
        return self._whole_prefill(steps) if how == "whole" else self._segmented(steps[0], eager=how == "eager")

    def _flat_step(self, chunk: _Chunk, group: int, groups: int, prompts: list[np.ndarray]) -> FlatStep:
        """The tokens of one data rank; a rank without any takes part with none."""
        in_group = len(self._tables) // groups
        first = group * in_group
        query_lens, kv_lens = np.zeros(in_group, np.int32), np.zeros(in_group, np.int32)
        for request, start, end in chunk.parts:
            query_lens[request - first], kv_lens[request - first] = end - start, end
        none = [np.zeros(0, np.int32)]
        tokens = np.concatenate(none + [prompts[request][start:end] for request, start, end in chunk.parts])
        positions = np.concatenate(none + [np.arange(start, end) for _, start, end in chunk.parts])
        layout = step_layout(self._tables[first : first + in_group], query_lens, kv_lens, self._block_size)
        return FlatStep(tokens.astype(np.int32), positions.astype(np.int32), layout)

    def _segmented(self, step: FlatStep, *, eager: bool) -> jax.Array:
        return self._steps.segmented(
            self._leaves,
            self._pool,
            step,
            self._sampling,
            greedy=self._greedy,
            truncated=self._truncated,
            eager=eager,
        )

    def _whole_prefill(self, steps: list[FlatStep]) -> jax.Array:
        """Pads every data rank's step to one bucket and runs them as one executable."""
        size = bucket(max(len(step.tokens) for step in steps), LEAST_BUCKET)
        tokens, positions = np.zeros((2, len(steps), size), np.int32)
        slots = np.full((len(steps), size), -1, np.int32)
        for group, step in enumerate(steps):
            live = len(step.tokens)
            tokens[group, :live], positions[group, :live] = step.tokens, step.positions
            slots[group, :live] = step.layout.slots
        layouts = [step.layout for step in steps]
        batch = Batch(
            *self._rows(
                np.concatenate([layout.block_tables for layout in layouts]),
                np.concatenate([layout.query_starts for layout in layouts]),
                np.concatenate([layout.kv_lens for layout in layouts]),
            )
        )
        with self._borrowed() as lent:
            picked, lent.caches = self._steps.prefill(
                self._leaves,
                lent.caches,
                *self._rows(tokens.reshape(-1), positions.reshape(-1), slots.reshape(-1)),
                batch,
                self._sampling,
                greedy=self._greedy,
                truncated=self._truncated,
            )
        return picked

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[LentCaches]:
        """The pools for one whole step, which must still hold every page of the tables."""
        with self._pool.borrow() as lent:
            if self._checked_life != self._pool.epoch.value:
                check_pages(self._tables, self._pool.num_pages)
                self._checked_life = self._pool.epoch.value
            yield lent

    def _rows(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Arrays with the data ranks' rows one after the other, on the devices."""
        if (ranks := self._steps.ranks) is None:
            return [jnp.asarray(array) for array in arrays]
        return ranks.place(list(arrays), [ranks.rows] * len(arrays))

    def fetch(self, rows: jax.Array) -> np.ndarray:
        """What a step gave, on the host."""
        return np.asarray(rows) if self._steps.ranks is None else self._steps.ranks.fetch(rows)

    def decode(self, first: np.ndarray, kv_lens: np.ndarray, num_rows: int, count: int) -> Iterator[jax.Array]:
        """Decode steps as one executable; tokens stay on the device from step to step."""
        tokens, lengths, tables = self._rows(first, kv_lens, self._tables)
        for _ in range(count):
            with self._borrowed() as lent:
                state = self._steps.decode(
                    self._leaves,
                    DecodeState(tokens, lengths, lent.caches),
                    tables,
                    self._sampling,
                    greedy=self._greedy,
                    truncated=self._truncated,
                )
                lent.caches = state.caches
            tokens, lengths = state.tokens, state.kv_lens
            yield tokens

    def decode_eagerly(self, first: np.ndarray, kv_lens: np.ndarray, num_rows: int, count: int) -> Iterator[jax.Array]:
        """Decode steps as segments at their exact size; each waits for the last one's tokens."""
        tokens, lengths = first[:num_rows], kv_lens[:num_rows]
        for _ in range(count):
            layout = step_layout(self._tables[:num_rows], np.ones(num_rows, np.int32), lengths + 1, self._block_size)
            picked = self._segmented(FlatStep(tokens, lengths, layout), eager=True)
            tokens, lengths = np.asarray(picked)[:num_rows], lengths + 1
            yield picked
