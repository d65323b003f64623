"""Sparse attention page by page: each page of keys is read once for all the queries that selected it.

The pairs (query, selected block) are sorted by block, so that a program finds runs of queries that want the same page.
It loads the page's keys and values once, then gathers the queries of the run in tiles of 64 or 128 rows (a query
brings all heads of its group), and writes one partial result a pair, and its weight: what its scores were reduced by,
and the sum that divides it (float16: it is divided, and the sum is 1). `merge_partials` joins the topk of a query.
However little the selections of neighbours overlap, the matrix instructions are full, and a page is read
T * topk / (number of pages) times less often than query by query.

Memory: the partial results take topk times the size of the queries; long batches are cut into chunks of tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Integer

from minimax_kernels.batch import Batch
from minimax_kernels.cache_types import as_read
from minimax_kernels.exponential import LOG2_E, exp2_scaled
from minimax_kernels.launch_table import PageLaunch
from minimax_kernels.merge_partials import merge_partials
from minimax_kernels.triton_call import ceil_div, triton_call


def _nothing(dtype: Any) -> int:
    """The key of this type that sorts behind every page."""
    return int(jnp.iinfo(dtype).max)


def attend_by_page(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    selected: Int[Array, "S T topk"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Array, "T Hq D"] | None,
    launch: PageLaunch,
    interpret: bool,
) -> Float[Array, "T Hq D"]:
    """See `minimax_kernels.sparse_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    groups, _, topk = selected.shape
    pair_bytes = groups * topk * (num_heads // groups) * head_dim * q.dtype.itemsize
    chunk = max(launch.workspace_bytes // pair_bytes, 1)
    num_chunks = ceil_div(num_tokens, chunk)
    chunk = ceil_div(num_tokens, num_chunks)
    request, position = row_positions(batch, num_tokens)
    live = position >= 0
    # what a token cannot see names no page of its own
    selected = jnp.where(selected * k_cache.shape[2] <= position[None, :, None], selected, -1)
    if out is None:
        out = None if num_chunks == 1 else jnp.zeros_like(q)
    for first in range(0, num_tokens, chunk):
        tokens = min(chunk, num_tokens - first)
        window = slice(first, first + tokens)
        partial, top, total = _attend_chunk(
            q, k_cache, v_cache, selected[:, window], batch, request[window], live[window], scale=scale,
            first_token=first, launch=launch, interpret=interpret,
        )  # fmt: skip
        out = merge_partials(
            partial, top, total, selected, batch.query_starts, out=out, dtype=q.dtype, interpret=interpret,
            first_token=first,
        )  # fmt: skip
    assert out is not None
    return out


def row_positions(batch: Batch, num_tokens: int) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """The request of each flat row (the last one for padding), and its position there (-1 for padding)."""
    rows, starts = jnp.arange(num_tokens, dtype=jnp.int32), batch.query_starts
    request = jnp.sum(rows[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, batch.num_requests - 1)
    position = batch.kv_lens[request] - starts[request + 1] + rows
    return request, jnp.where(rows < starts[-1], position, -1).astype(jnp.int32)


def sort_pairs(
    selected: Int[Array, "S T topk"],
    request: Int[Array, "T"],
    live: Bool[Array, "T"],
    *,
    num_requests: int,
    num_blocks: int,
    window: int,
) -> tuple[Integer[Array, "S*T*topk"], Int[Array, "S*T*topk"]]:
    """Pairs (query, block) in the order of window, group and page: (key of each pair's run, the pair).

    A window of tokens at a time, so that what runs together gathers its queries from the second-level cache. Keys have
    16 bits where that suffices: a radix sort goes over the pairs half as often.
    """
    groups, tokens, _ = selected.shape
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    in_window = (jnp.arange(tokens, dtype=jnp.int32) // window)[None, :, None]
    key = ((in_window * groups + group) * num_requests + request[None, :, None]) * num_blocks + selected
    runs = ceil_div(tokens, window) * groups * num_requests * num_blocks
    dtype = jnp.uint16 if runs <= _nothing(jnp.uint16) else jnp.int32
    key = jnp.where((selected >= 0) & live[None, :, None], key, _nothing(dtype)).reshape(-1)
    pair = jnp.arange(key.shape[0], dtype=jnp.int32)
    key, pair = lax.sort((key.astype(dtype), pair), num_keys=1, is_stable=True)
    return key, pair


def _attend_chunk(
    q, k_cache, v_cache, selected, batch: Batch, request, live, *, scale, first_token, launch: PageLaunch, interpret
):
    groups, tokens, topk = selected.shape
    _, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    rows_per_token = num_heads // groups
    keys, pairs = sort_pairs(
        selected, request, live, num_requests=batch.num_requests, num_blocks=batch.num_blocks, window=launch.window
    )
    num_pairs = keys.shape[0]
    per_program = launch.pairs_per_program
    sizes: dict[str, Any] = {
        "num_pairs": num_pairs, "num_requests": batch.num_requests, "num_blocks": batch.num_blocks, "topk": topk,
        "tokens": tokens, "rows_per_token": rows_per_token, "groups": groups, "kv_share": groups // num_kv_heads,
        "block_size": block_size, "per_program": per_program, "rows": launch.rows, "scale": scale * LOG2_E,
        "first_token": first_token, "interpret": interpret,
    }  # fmt: skip
    return triton_call(
        functools.partial(_attend_kernel, **sizes),
        (q, k_cache, v_cache, batch.block_tables, batch.query_starts, batch.kv_lens, keys, pairs),
        (
            jax.ShapeDtypeStruct((tokens, groups, topk, rows_per_token, head_dim), q.dtype),
            *(jax.ShapeDtypeStruct((tokens, groups, topk, rows_per_token), jnp.float32),) * 2,
        ),
        grid=(ceil_div(num_pairs, per_program),),
        launch=launch.launch,
        name="sparse_attention_by_page",
        interpret=interpret,
    )


def _attend_kernel(
    q_ref, k_ref, v_ref, tables_ref, starts_ref, kv_lens_ref, keys_ref, pairs_ref, partial_ref, top_ref, total_ref,
    *, num_pairs, num_requests, num_blocks, topk, tokens, rows_per_token, groups, kv_share, block_size, per_program,
    rows, scale, first_token, interpret,
):  # fmt: skip
    base = pl.program_id(0) * per_program
    head_dim = q_ref.shape[2]
    queries = rows // rows_per_token
    lane = jnp.arange(per_program, dtype=jnp.int32)
    nothing = _nothing(keys_ref.dtype)
    all_keys = plgpu.load(
        keys_ref.at[jnp.minimum(base + lane, num_pairs - 1)], mask=base + lane < num_pairs, other=nothing
    ).astype(jnp.int32)
    row = jnp.arange(rows, dtype=jnp.int32)
    query, head = lax.div(row, rows_per_token), lax.rem(row, rows_per_token)
    channel = jnp.arange(head_dim, dtype=jnp.int32)
    key_in_page = jnp.arange(block_size, dtype=jnp.int32)

    def run_of_pairs(state):
        """All pairs of this program that want one page."""
        start, key = state
        count = jnp.sum(all_keys == key, dtype=jnp.int32)
        group = lax.rem(lax.div(key, num_requests * num_blocks), groups)
        request = lax.rem(lax.div(key, num_blocks), num_requests)
        block = lax.rem(key, num_blocks)
        page = tables_ref[request, block]
        kv_head = lax.div(group, kv_share)
        keys = as_read(k_ref[page, kv_head], q_ref.dtype)
        kv_len = kv_lens_ref[request]
        # what no request owns may be NaN, and 0 * NaN is NaN: such values are read as zeros
        owned = block * block_size + key_in_page < kv_len
        values = plgpu.load(
            v_ref.at[page, kv_head], mask=jnp.broadcast_to(owned[:, None], (block_size, head_dim)), other=0.0
        )
        values = as_read(values, q_ref.dtype)
        # a token's last visible key in this page is token + to_last_key
        to_last_key = first_token + kv_len - starts_ref[request + 1] - block * block_size
        first_pair = group * tokens * topk

        def pair_at(index):
            return pairs_ref[jnp.minimum(base + start + index, num_pairs - 1)] - first_pair

        def queries_of(pair):
            return q_ref[
                jnp.clip(first_token + lax.div(pair, topk), 0, q_ref.shape[0] - 1)[:, None],
                (group * rows_per_token + head)[:, None],
                channel[None, :],
            ]

        def tile(i, carry):
            # all were loaded one step ahead: the queries, and two steps ahead for the next: the pairs that name them
            q, pair, next_pair, leading = carry
            following = (
                queries_of(next_pair), next_pair, pair_at((i + 2) * queries + query), pair_at((i + 1) * queries)
            )  # fmt: skip
            live = i * queries + query < count
            token, choice = lax.div(pair, topk), lax.rem(pair, topk)
            scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

            def causal(scores):
                return jnp.where(key_in_page[None, :] <= (token + to_last_key)[:, None], scores, -jnp.inf)

            # queries of a run stand in the order of their positions: if the first sees the whole page, all do
            sees_all = lax.div(leading, topk) + to_last_key >= block_size - 1
            scores = lax.cond(sees_all, lambda scores: scores, causal, scores)
            top = jnp.max(scores, axis=1) * scale
            weights = exp2_scaled(scores, scale, jnp.where(top == -jnp.inf, 0.0, top), interpret=interpret)
            total = jnp.sum(weights, axis=1)
            attended = lax.dot_general(
                weights.astype(values.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            if partial_ref.dtype == jnp.float16:  # sums of values need not fit it
                safe_total = jnp.where(total == 0, 1.0, total)
                attended *= (1.0 / safe_total)[:, None]
                top, total = top + jnp.log2(safe_total), jnp.where(total == 0, 0.0, 1.0)
            to_token = jnp.where(live, token, tokens)  # out of range where nothing is written
            plgpu.store(
                partial_ref.at[to_token[:, None], group, choice[:, None], head[:, None], channel[None, :]],
                attended.astype(partial_ref.dtype),
                mask=jnp.broadcast_to(live[:, None], (rows, head_dim)),
            )
            plgpu.store(top_ref.at[to_token, group, choice, head], top, mask=live)
            plgpu.store(total_ref.at[to_token, group, choice, head], total, mask=live)
            return following

        pair, next_pair = pair_at(query), pair_at(queries + query)
        first = (queries_of(pair), pair, next_pair, pair_at(0))
        lax.fori_loop(0, lax.div(count + queries - 1, queries), tile, first)
        following = start + count
        inside = (following < per_program) & (base + following < num_pairs)
        next_key = keys_ref[jnp.minimum(base + following, num_pairs - 1)].astype(jnp.int32)
        return following, jnp.where(inside, next_key, nothing)

    first_key = keys_ref[base].astype(jnp.int32)
    lax.while_loop(lambda state: state[1] != nothing, run_of_pairs, (jnp.int32(0), first_key))
