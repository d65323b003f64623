"""Generation for a fixed batch of prompts over paged caches: prefill in chunks, then decode."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.attention import check_pages, step_layout
from minimax_jax.buckets import bucket
from minimax_jax.cache import LentCaches, PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.execution import check_execution, prefill_execution
from minimax_jax.engine.generation_config import GenerationConfig
from minimax_jax.engine.sampler import SamplingState, sampling_state
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


def block_tables(pages_of: list[int], rows: int) -> np.ndarray:
    """[rows, N] tables in which each request owns pages of its own; entries without a page name page 0."""
    tables = np.zeros((rows, bucket(max(pages_of))), np.int32)
    first = 0
    for request, pages in enumerate(pages_of):
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
    rows = bucket(num_rows)
    block_size = config.index_block_size
    # the last token is never written, so the longest context is one shorter than all tokens
    pages_of = [-(-(len(p) + max_new_tokens - 1) // block_size) for p in prompts]
    tables = block_tables(pages_of, rows)
    held = PagePool(config, bucket(sum(pages_of)), cache_dtype, leaves[0].sharding) if pool is None else pool
    if held.num_pages < sum(pages_of):
        raise ValueError(f"pool has {held.num_pages} pages: must have at least {sum(pages_of)} for these sequences")
    sampling = sampling_state(seed, rows, options.temperature, options.top_p, options.top_k, config.vocab_size)
    run = _Run(steps, leaves, held, tables, block_size, sampling, options, execution)
    try:
        first = np.zeros(rows, np.int32)
        for chunk in prefill_chunks([len(p) for p in prompts], max_prefill_tokens):
            picked = np.asarray(run.prefill(chunk, prompts))
            for request, _, end in chunk.parts:
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
            pending = np.asarray(tokens)[:num_rows]
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

    def prefill(self, chunk: _Chunk, prompts: list[np.ndarray]) -> jax.Array:
        """One prefill step; returns the token after each request's part of it."""
        query_lens, kv_lens = np.zeros(len(self._tables), np.int32), np.zeros(len(self._tables), np.int32)
        for request, start, end in chunk.parts:
            query_lens[request], kv_lens[request] = end - start, end
        tokens = np.concatenate([prompts[request][start:end] for request, start, end in chunk.parts])
        positions = np.concatenate([np.arange(start, end) for _, start, end in chunk.parts])
        layout = step_layout(self._tables, query_lens, kv_lens, self._block_size)
        step = FlatStep(tokens.astype(np.int32), positions.astype(np.int32), layout)
        how = prefill_execution(self._execution, chunk.num_tokens, self._num_layers, self._platform)
        return self._whole_prefill(step) if how == "whole" else self._segmented(step, eager=how == "eager")

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

    def _whole_prefill(self, step: FlatStep) -> jax.Array:
        """Pads the step to a bucket and runs it as one executable."""
        layout, live = step.layout, len(step.tokens)
        padded = {name: np.zeros(bucket(live, LEAST_BUCKET), np.int32) for name in ("tokens", "positions", "slots")}
        padded["tokens"][:live], padded["positions"][:live] = step.tokens, step.positions
        padded["slots"][:live], padded["slots"][live:] = layout.slots, -1
        batch = Batch(*map(jnp.asarray, (layout.block_tables, layout.query_starts, layout.kv_lens)))
        with self._borrowed() as lent:
            picked, lent.caches = self._steps.prefill(
                self._leaves,
                lent.caches,
                *padded.values(),
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

    def decode(self, first: np.ndarray, kv_lens: np.ndarray, num_rows: int, count: int) -> Iterator[jax.Array]:
        """Decode steps as one executable; tokens stay on the device from step to step."""
        tokens, lengths, tables = jnp.asarray(first), jnp.asarray(kv_lens), jnp.asarray(self._tables)
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
