"""Block scores of the index branch: two Pallas kernels, one for many query rows and one for few.

Many rows (prefill): 128 rows of queries are multiplied with one page of keys at a time; a row is a token and an
index head, so all heads share the read of the keys. Few rows (decode, verification of drafts): up to 16 of one request
on the M side of the matrix instruction; of more, and over keys of 8 bits, the 128 keys of a page stand there.
Both are split over the keys: each program scores a range of blocks, and nothing is left to merge.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from minimax_kernels.batch import Batch, tile_size
from minimax_kernels.cache_types import as_read, is_fp8
from minimax_kernels.fp8_queries import product_rows
from minimax_kernels.launch_table import LEAST_ROWS, ScoreLaunch, score_launch
from minimax_kernels.ragged_tiles import locate_tile, num_tiles
from minimax_kernels.register_order import register_order
from minimax_kernels.triton_call import ceil_div, next_power_of_two, triton_call
from minimax_kernels.triton_support import require_pages, require_power_of_two

FEW_ROWS = 16  # queries of one request that the few-rows kernel takes


def index_score(
    idx_q: Float[Array, "T Hi D"],
    index_cache: Float[Array, "P B D"],
    batch: Batch,
    *,
    interpret: bool = False,
    launch: ScoreLaunch | None = None,
) -> Float[Array, "Hi T N"]:
    """See `minimax_kernels.index_score`."""
    (scores,) = score_and_clear(idx_q, index_cache, batch, 0, interpret=interpret, launch=launch)
    return scores


def score_and_clear(
    idx_q: Float[Array, "T Hi D"],
    index_cache: Float[Array, "P B D"],
    batch: Batch,
    num_counters: int,
    *,
    interpret: bool,
    launch: ScoreLaunch | None = None,
) -> tuple[Array, ...]:
    """The scores; and, for `num_counters` > 0, zeros [T, num_counters] int32 that a kernel after this one counts in."""
    num_tokens, num_heads, head_dim = idx_q.shape
    block_size, num_blocks, num_requests = index_cache.shape[1], batch.num_blocks, batch.num_requests
    require_pages(idx_q, index_cache, block_size, head_dim, interpret=interpret)
    require_power_of_two("idx_q's Hi", num_heads, 8)
    mean_rows = tile_size(num_tokens, num_requests, most=2 * FEW_ROWS)
    fp8 = is_fp8(index_cache.dtype)
    launch = launch or score_launch(num_tokens, num_blocks, num_heads, mean_rows, fp8=fp8)
    tile = launch.tile
    few = tile <= FEW_ROWS
    rows = max(LEAST_ROWS, next_power_of_two(tile * num_heads)) if few else tile * num_heads
    tiles = num_tiles(num_tokens, num_requests, tile)
    sizes: dict[str, Any] = {
        "num_requests": num_requests, "num_tokens": num_tokens, "num_heads": num_heads, "num_blocks": num_blocks,
        "block_size": block_size, "tile": tile, "blocks_per_program": launch.blocks_per_program,
        "rows": rows, "keys_first": launch.keys_first, "num_counters": num_counters,
    }  # fmt: skip
    out_shapes = [jax.ShapeDtypeStruct((num_heads, num_tokens, num_blocks), jnp.float32)]
    if num_counters:
        out_shapes.append(jax.ShapeDtypeStruct((num_tokens, num_counters), jnp.int32))
    return triton_call(
        functools.partial(_score_kernel, **sizes),
        (idx_q, index_cache, batch.block_tables, batch.query_starts, batch.kv_lens),
        tuple(out_shapes),
        grid=(tiles, ceil_div(num_blocks, launch.blocks_per_program)),
        launch=launch.launch,
        name="index_score_few_rows" if few else "index_score_many_rows",
        interpret=interpret,
    )


def _score_kernel(
    q_ref, index_ref, tables_ref, starts_ref, kv_lens_ref, out_ref, *counters_ref,
    rows, keys_first, num_requests, num_tokens, num_heads, num_blocks, block_size, tile, blocks_per_program,
    num_counters,
):  # fmt: skip
    at = locate_tile(
        starts_ref, kv_lens_ref, pl.program_id(0), tile=tile, num_tokens=num_tokens, num_requests=num_requests
    )
    begin = pl.program_id(1) * blocks_per_program
    if tile == 1:  # loaded before the request is known for sure
        likely = jnp.minimum(pl.program_id(0), num_requests - 1)
        likely_page = tables_ref[likely, begin]
    head_shift = num_heads.bit_length() - 1
    row = jnp.arange(rows, dtype=jnp.int32)
    token, head = lax.shift_right_logical(row, head_shift), row & (num_heads - 1)
    live = token < at.num_rows
    flat = jnp.where(live, at.first_row + token, num_tokens)  # out of range where there is no row
    channel = jnp.arange(q_ref.shape[2], dtype=jnp.int32)
    q = plgpu.load(
        q_ref.at[jnp.minimum(flat, num_tokens - 1)[:, None], head[:, None], channel[None, :]],
        mask=jnp.broadcast_to(live[:, None], (rows, q_ref.shape[2])),
        other=0.0,
    )
    q, factor = product_rows(q, index_ref.dtype)
    # keys of 8 bits become the operand in registers: as they lie in memory, or a thread would load them in twos
    by_register = keys_first and is_fp8(index_ref.dtype)
    q = register_order(q, q.shape[1]) if by_register else q
    position = at.first_position + token
    if num_counters:

        @pl.when(pl.program_id(1) == 0)
        def _clear():
            cell = jnp.arange(next_power_of_two(tile * num_counters), dtype=jnp.int32)
            inside = lax.div(cell, num_counters) < at.num_rows
            to_row = jnp.where(inside, at.first_row + lax.div(cell, num_counters), num_tokens)
            plgpu.store(counters_ref[0].at[to_row, lax.rem(cell, num_counters)], jnp.zeros_like(cell), mask=inside)

    is_padding = at.request == num_requests
    request = jnp.minimum(at.request, num_requests - 1)
    stop = jnp.where(at.num_rows > 0, jnp.minimum(begin + blocks_per_program, num_blocks), begin)
    block_shift = block_size.bit_length() - 1
    # blocks that all rows see whole, then those that some row sees in part, then those that none sees
    whole = lax.shift_right_arithmetic(at.first_position + 1, block_shift)
    some = lax.shift_right_arithmetic(at.first_position + at.num_rows - 1, block_shift) + 1
    whole_stop = jnp.where(is_padding, begin, jnp.clip(whole, begin, stop))
    some_stop = jnp.where(is_padding, begin, jnp.clip(some, begin, stop))

    def store(block, best):
        plgpu.store(out_ref.at[head, flat, jnp.full((rows,), block, jnp.int32)], best, mask=live)

    def score(block, page, masked):
        keys = index_ref[page]
        keys = as_read(register_order(keys, keys.shape[1]) if by_register else keys, q.dtype)
        if keys_first:
            scores = lax.dot_general(keys, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            key_axis = 0
        else:
            scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            key_axis = 1
        if masked:
            key = block * block_size + jnp.arange(block_size, dtype=jnp.int32)
            seen = key[:, None] <= position[None, :] if keys_first else key[None, :] <= position[:, None]
            scores = jnp.where(seen, scores, -jnp.inf)
        best = jnp.max(scores, axis=key_axis)
        store(block, best if factor is None else best * factor)

    def page_of(block):
        return tables_ref[request, jnp.minimum(block, num_blocks - 1)]

    def step(block, page, masked):
        following = page_of(block + 1)  # a step ahead of its use, so that the load of the keys does not wait for it
        score(block, page, masked)
        return following

    page = lax.cond(at.request == likely, lambda: likely_page, lambda: page_of(begin)) if tile == 1 else page_of(begin)
    if rows > LEAST_ROWS:
        page = lax.fori_loop(begin, whole_stop, functools.partial(step, masked=False), page)
        lax.fori_loop(whole_stop, some_stop, functools.partial(step, masked=True), page)
    else:  # what a mask costs is nothing beside the read of the keys; a second loop takes registers
        lax.fori_loop(begin, some_stop, functools.partial(step, masked=True), page)

    def fill(block, carry):
        store(block, jnp.full((rows,), -jnp.inf, jnp.float32))
        return carry

    lax.fori_loop(some_stop, stop, fill, 0)
