"""The attention kernel of one tile of query rows over a list of pages, split over the pages: dense and sparse.

A program takes the query heads of one KV head (or of one selection) for a tile of tokens of one request, and walks
its share of the tile's pages with the running softmax. With one share it writes the result; with more it writes
partial results for `merge_partials`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.batch import Batch
from minimax_kernels.exponential import LOG2_E, exp2_scaled
from minimax_kernels.launch_table import AttendLaunch
from minimax_kernels.merge_partials import merge_partials
from minimax_kernels.ragged_tiles import locate_tile, num_tiles
from minimax_kernels.triton_call import ceil_div, next_power_of_two, triton_call


def attend_pages(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    batch: Batch,
    *,
    selected: Int[Array, "S T topk"] | None,
    scale: float,
    out: Float[Array, "T Hq D"] | None,
    launch: AttendLaunch,
    interpret: bool,
) -> Float[Array, "T Hq D"]:
    """Attention over the blocks in `selected` (tiles of one token), or over all of them (None).

    S selections, a multiple of Hkv, split the query heads evenly.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    groups = num_kv_heads if selected is None else selected.shape[0]
    blocks = batch.num_blocks if selected is None else selected.shape[2]
    tile = launch.tile if selected is None else 1
    splits = ceil_div(blocks, launch.blocks_per_program)
    rows_per_token = num_heads // groups
    sizes: dict[str, Any] = {
        "num_tokens": num_tokens, "num_requests": batch.num_requests, "num_blocks": batch.num_blocks,
        "block_size": block_size, "tile": tile, "rows_per_token": rows_per_token, "kv_share": groups // num_kv_heads,
        "rows": max(16, next_power_of_two(tile * rows_per_token)), "blocks": blocks,
        "blocks_per_program": launch.blocks_per_program, "keys_per_step": min(launch.keys_per_step, block_size),
        "scale": scale * LOG2_E, "is_dense": selected is None, "splits": splits, "interpret": interpret,
    }  # fmt: skip
    args = [q, k_cache, v_cache, batch.block_tables, batch.query_starts, batch.kv_lens]
    if selected is not None:
        args.append(selected)
    grid = (num_tiles(num_tokens, batch.num_requests, tile), groups, splits)
    name = "dense_attention" if selected is None else "sparse_attention_by_token"
    if splits == 1:
        fresh = out is None
        kernel = functools.partial(_attend_kernel, fresh=fresh, has_out=not fresh, **sizes)
        return triton_call(
            kernel,
            args if out is None else [*args, out],
            jax.ShapeDtypeStruct(q.shape, q.dtype if out is None else out.dtype),
            grid=grid,
            launch=launch.launch,
            name=name,
            interpret=interpret,
            aliases=None if fresh else {len(args): 0},
        )
    partial, lse = triton_call(
        functools.partial(_attend_kernel, fresh=True, has_out=False, **sizes),
        args,
        (
            jax.ShapeDtypeStruct((num_tokens, groups, splits, rows_per_token, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_tokens, groups, splits, rows_per_token), jnp.float32),
        ),
        grid=grid,
        launch=launch.launch,
        name=name,
        interpret=interpret,
    )
    return merge_partials(partial, lse, None, batch.query_starts, out=out, dtype=q.dtype, interpret=interpret)


def _attend_kernel(
    *refs: Any, num_tokens, num_requests, num_blocks, block_size, tile, rows_per_token, kv_share, rows, blocks,
    blocks_per_program, keys_per_step, scale, is_dense, splits, fresh, has_out, interpret,
):  # fmt: skip
    q_ref, k_ref, v_ref, tables_ref, starts_ref, kv_lens_ref, *refs = refs  # type: ignore[assignment]
    selected_ref = None if is_dense else refs.pop(0)
    if has_out:
        refs.pop(0)  # the same memory as the output
    out_ref = refs.pop(0)
    lse_ref = refs.pop(0) if refs else None

    group, split = pl.program_id(1), pl.program_id(2)
    at = locate_tile(
        starts_ref, kv_lens_ref, pl.program_id(0), tile=tile, num_tokens=num_tokens, num_requests=num_requests
    )
    kv_head = lax.div(group, kv_share)
    is_padding = at.request == num_requests
    request = jnp.minimum(at.request, num_requests - 1)
    head_dim = q_ref.shape[2]
    row = jnp.arange(rows, dtype=jnp.int32)
    token, head = lax.div(row, rows_per_token), lax.rem(row, rows_per_token)
    live = token < at.num_rows
    flat = at.first_row + token
    channel = jnp.arange(head_dim, dtype=jnp.int32)
    q = plgpu.load(
        q_ref.at[
            jnp.minimum(flat, num_tokens - 1)[:, None], (group * rows_per_token + head)[:, None], channel[None, :]
        ],
        mask=jnp.broadcast_to((live & ~is_padding)[:, None], (rows, head_dim)),
        other=0.0,
    )
    position = jnp.where(live, at.first_position + token, -1)
    kv_len = kv_lens_ref[request]
    first = split * blocks_per_program
    last_position = at.first_position + at.num_rows - 1
    if is_dense:
        shift = block_size.bit_length() - 1
        stop = jnp.minimum(first + blocks_per_program, lax.shift_right_arithmetic(last_position, shift) + 1)
    else:
        stop = jnp.minimum(first + blocks_per_program, blocks)
    stop = jnp.where(is_padding | (at.num_rows == 0), first, stop)

    def block_at(i):
        i = jnp.minimum(i, blocks - 1)
        if is_dense:
            return i
        return selected_ref[group, jnp.minimum(at.first_row, num_tokens - 1), i]

    def page_of(block):
        return tables_ref[request, jnp.clip(block, 0, num_blocks - 1)]

    def attend(block, page, offset, state):
        """One step of the running softmax over `keys_per_step` keys of a page."""
        top, total, acc = state
        key = block * block_size + offset + jnp.arange(keys_per_step, dtype=jnp.int32)
        keys = k_ref[page, kv_head, pl.ds(offset, keys_per_step), :]
        scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        seen = (key[None, :] <= position[:, None]) & (block >= 0)
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scale)
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # nothing seen yet: exp2(-inf - 0) = 0
        weights = exp2_scaled(scores, scale, shift, interpret=interpret)
        rescale = jnp.exp2(top - shift)
        # what no request owns may be NaN, and 0 * NaN is NaN: such values are read as zeros
        values = plgpu.load(
            v_ref.at[page, kv_head, pl.ds(offset, keys_per_step), :],
            mask=jnp.broadcast_to(((key < kv_len) & (block >= 0))[:, None], (keys_per_step, head_dim)),
            other=0.0,
        )
        acc = acc * rescale[:, None]
        acc += lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return new_top, total * rescale + jnp.sum(weights, axis=1), acc

    steps = block_size // keys_per_step
    steps_shift = steps.bit_length() - 1

    def step(i, carry):
        block, page, following, *state = carry
        # two steps ahead of its use for the block id, one for the page: loads of keys wait for neither
        index, offset = lax.shift_right_logical(i, steps_shift), (i & (steps - 1)) * keys_per_step
        state = attend(block, page, offset, state)
        is_last = (i & (steps - 1)) == steps - 1
        next_block = jnp.where(is_last, following, block)
        return (
            next_block,
            jnp.where(is_last, page_of(following), page),
            jnp.where(is_last, block_at(index + 2), following),
            *state,
        )

    block = block_at(first)
    init = (
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )
    carry = (block, page_of(block), block_at(first + 1), *init)
    _, _, _, top, total, acc = lax.fori_loop(first * steps, stop * steps, step, carry)
    result = acc * (1.0 / jnp.where(total == 0, 1.0, total))[:, None]

    writes = live if fresh else live & ~is_padding
    to_row = jnp.where(writes, flat, num_tokens)  # out of range where nothing is written
    if splits == 1:
        plgpu.store(
            out_ref.at[to_row[:, None], (group * rows_per_token + head)[:, None], channel[None, :]],
            result.astype(out_ref.dtype),
            mask=jnp.broadcast_to(writes[:, None], (rows, head_dim)),
        )
        return
    plgpu.store(
        out_ref.at[to_row[:, None], group, split, head[:, None], channel[None, :]],
        result.astype(out_ref.dtype),
        mask=jnp.broadcast_to(writes[:, None], (rows, head_dim)),
    )
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log2(jnp.where(total == 0, 1.0, total)))
    plgpu.store(lse_ref.at[to_row, group, split, head], lse, mask=writes)
