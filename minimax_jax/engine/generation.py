"""Generation for a fixed batch of prompts over paged caches: prefill in chunks, then decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.cache import PagedCaches, allocate_pages
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.buckets import bucket
from minimax_jax.engine.generation_config import GenerationConfig
from minimax_jax.engine.sampler import SamplingState, sampling_state
from minimax_jax.engine.steps import DecodeState, Steps
from minimax_kernels import Batch

MAX_PREFILL_TOKENS = 8192  # prompt tokens of one prefill step; longer prompts take several


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
) -> Iterator[np.ndarray]:
    """Yields the new tokens [R] of every step, at most `max_new_tokens` times.

    The step after the one that is yielded already runs on the device meanwhile. A row goes on after its
    end-of-text token; the caller decides when to stop.
    """
    num_rows = len(prompts)
    rows = bucket(num_rows)
    block_size = config.index_block_size
    # the last token is never written, so the longest context is one shorter than all tokens
    pages_of = [-(-(len(p) + max_new_tokens - 1) // block_size) for p in prompts]
    tables = block_tables(pages_of, rows)
    caches = allocate_pages(config, bucket(sum(pages_of)), cache_dtype, leaves[0].sharding)
    sampling = sampling_state(seed, rows, options.temperature, options.top_p, options.top_k, config.vocab_size)
    static = {"greedy": options.greedy, "truncated": options.top_k > 0 or options.top_p < 1}

    first = np.zeros(rows, np.int32)
    for chunk in prefill_chunks([len(p) for p in prompts], max_prefill_tokens):
        step_tokens, caches = _run_chunk(steps, leaves, caches, chunk, prompts, tables, block_size, sampling, static)
        picked = np.asarray(step_tokens)
        for request, _, end in chunk.parts:
            if end == len(prompts[request]):
                first[request] = picked[request]
    kv_lens = np.zeros(rows, np.int32)
    kv_lens[:num_rows] = [len(p) for p in prompts]
    state = DecodeState(jnp.asarray(first), jnp.asarray(kv_lens), caches)
    device_tables = jnp.asarray(tables)
    yield first[:num_rows]  # at once: the first decode step may have to be compiled
    pending: np.ndarray | None = None
    for _ in range(max_new_tokens - 1):
        state = steps.decode(leaves, state, device_tables, sampling, **static)
        if pending is not None:
            yield pending  # while the device works on the next token
        pending = np.asarray(state.tokens)[:num_rows]
    if pending is not None:
        yield pending


def _run_chunk(
    steps: Steps,
    leaves: list[jax.Array],
    caches: PagedCaches,
    chunk: _Chunk,
    prompts: list[np.ndarray],
    tables: np.ndarray,
    block_size: int,
    sampling: SamplingState,
    static: dict[str, bool],
) -> tuple[jax.Array, PagedCaches]:
    """One prefill step: lays the chunk's tokens out flat, padded to a bucket."""
    num_tokens, rows = bucket(chunk.num_tokens, 16), len(tables)
    tokens = np.zeros(num_tokens, np.int32)
    positions = np.zeros(num_tokens, np.int32)
    slots = np.full(num_tokens, -1, np.int32)
    query_lens, kv_lens = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    at = 0
    for request, start, end in chunk.parts:
        own = np.arange(start, end, dtype=np.int32)
        span = slice(at, at + end - start)
        tokens[span] = prompts[request][start:end]
        positions[span] = own
        slots[span] = tables[request, own // block_size] * block_size + own % block_size
        query_lens[request], kv_lens[request] = end - start, end
        at += end - start
    query_starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    batch = Batch(jnp.asarray(tables), jnp.asarray(query_starts), jnp.asarray(kv_lens))
    return steps.prefill(leaves, caches, tokens, positions, slots, batch, sampling, **static)
