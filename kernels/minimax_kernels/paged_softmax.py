"""The attention kernel of one tile of query rows over a list of pages, split over the pages: dense and sparse.

A program takes the query heads of one KV head (or of one selection) for a tile of tokens of one request, and walks
its share of the tile's pages with the running softmax. The pages are all of the request's (dense), those of a given
selection, or those that it selects itself from the blocks' scores. Where the pages are split over several programs,
each writes a partial result, and the one that finishes last merges them: no second launch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.batch import Batch
from minimax_kernels.cache_types import as_read
from minimax_kernels.exponential import LOG2_E, exp2_scaled
from minimax_kernels.fp8_queries import product_rows
from minimax_kernels.launch_table import AttendLaunch
from minimax_kernels.merge_partials import merge_last_program
from minimax_kernels.ragged_tiles import Tile, locate_tile, num_tiles
from minimax_kernels.select_blocks.ranks import rank_blocks
from minimax_kernels.triton_call import ceil_div, next_power_of_two, triton_call


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which pages a token attends to.

    Attributes:
      blocks: [S, T, topk] selected blocks, or
      scores: [Hi, T, N] scores of all blocks to select `topk` from; index head h serves groups h * S / Hi onwards.
      topk, init_blocks, local_blocks: as in `select_blocks`; the last two with scores only.
    """

    topk: int
    blocks: Int[Array, "S T topk"] | None = None
    scores: Float[Array, "Hi T N"] | None = None
    init_blocks: int = 0
    local_blocks: int = 1


def attend_pages(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    batch: Batch,
    *,
    groups: int,
    selection: Selection | None,
    scale: float,
    out: Float[Array, "T Hq D"] | None,
    launch: AttendLaunch,
    interpret: bool,
    counters: Int[Array, "T S"] | None = None,
) -> Float[Array, "T Hq D"]:
    """Attention over selected blocks (tiles of one token), or over all of them (`selection` is None).

    Args:
      groups: S, a multiple of Hkv; the query heads of one share pages.
      counters: zeros, where a kernel before this one has made them; consumed.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    tile = launch.tile if selection is None else 1
    blocks = batch.num_blocks if selection is None else selection.topk
    splits = ceil_div(blocks, launch.blocks_per_program)
    rows_per_token = num_heads // groups
    rows = max(16, next_power_of_two(tile * rows_per_token))
    args = [q, k_cache, v_cache, batch.block_tables, batch.query_starts, batch.kv_lens]
    pages = "dense"
    if selection is not None and selection.blocks is not None:
        pages = "selected"
        args.append(selection.blocks)
    elif selection is not None and selection.scores is not None:
        pages = "scored"
        args.append(selection.scores)
    sizes: dict[str, Any] = {
        "num_tokens": num_tokens, "num_requests": batch.num_requests, "num_blocks": batch.num_blocks,
        "block_size": block_size, "tile": tile, "rows_per_token": rows_per_token, "kv_share": groups // num_kv_heads,
        "rows": rows, "blocks": blocks, "blocks_per_program": launch.blocks_per_program,
        "keys_per_step": min(launch.keys_per_step, block_size), "scale": scale * LOG2_E, "pages": pages,
        "splits": splits, "interpret": interpret, "fresh": out is None,
        "groups_per_index_head": groups // selection.scores.shape[0] if pages == "scored" else 1,  # type: ignore[union-attr]
        "init_blocks": selection.init_blocks if selection is not None else 0,
        "local_blocks": selection.local_blocks if selection is not None else 0,
    }  # fmt: skip
    out_shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype if out is None else out.dtype)]
    aliases = {}
    if out is not None:
        aliases[len(args)] = 0
        args.append(out)
    if splits > 1:
        tiles = num_tiles(num_tokens, batch.num_requests, tile)
        if counters is None:
            counters = jnp.zeros((tiles, groups), jnp.int32)
        aliases[len(args)] = 1
        args.append(counters)
        out_shapes += [
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
            jax.ShapeDtypeStruct((tiles, groups, splits, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((tiles, groups, splits, rows), jnp.float32),
        ]
    result = triton_call(
        functools.partial(_attend_kernel, **sizes),
        args,
        tuple(out_shapes),
        grid=(num_tiles(num_tokens, batch.num_requests, tile), groups, splits),
        launch=launch.launch,
        name="dense_attention" if selection is None else "sparse_attention_by_token",
        interpret=interpret,
        aliases=aliases,
    )
    return result[0]


def _attend_kernel(
    *refs: Any, num_tokens, num_requests, num_blocks, block_size, tile, rows_per_token, kv_share, rows, blocks,
    blocks_per_program, keys_per_step, scale, pages, splits, interpret, fresh, groups_per_index_head, init_blocks,
    local_blocks,
):  # fmt: skip
    q_ref, k_ref, v_ref, tables_ref, starts_ref, kv_lens_ref, *more_refs = refs
    choice_ref = None if pages == "dense" else more_refs.pop(0)
    num_aliased = (0 if fresh else 1) + (1 if splits > 1 else 0)
    out_ref, *merge_refs = more_refs[num_aliased:]  # the inputs left out are the same memory as outputs

    tile_id, group, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    at = locate_tile(starts_ref, kv_lens_ref, tile_id, tile=tile, num_tokens=num_tokens, num_requests=num_requests)
    kv_head = lax.div(group, kv_share)
    is_padding = at.request == num_requests
    request = jnp.minimum(at.request, num_requests - 1)
    head_dim = q_ref.shape[2]
    row = jnp.arange(rows, dtype=jnp.int32)
    token, head = lax.div(row, rows_per_token), lax.rem(row, rows_per_token)
    live = token < at.num_rows
    flat = at.first_row + token
    channel = jnp.arange(head_dim, dtype=jnp.int32)
    # rows that are none are computed too, and not written: a mask would make the load wait for the tile's request
    q = q_ref[jnp.minimum(flat, num_tokens - 1)[:, None], (group * rows_per_token + head)[:, None], channel[None, :]]
    q, factor = product_rows(q, k_ref.dtype)
    scales = scale if factor is None else scale * factor
    position = jnp.where(live, at.first_position + token, -1)
    kv_len = kv_lens_ref[request]
    first = split * blocks_per_program
    block_at, num_listed = _page_list(
        choice_ref, at, group, pages=pages, blocks=blocks, num_blocks=num_blocks, block_size=block_size,
        groups_per_index_head=groups_per_index_head, init_blocks=init_blocks, local_blocks=local_blocks,
    )  # fmt: skip
    stop = jnp.minimum(first + blocks_per_program, num_listed)
    stop = jnp.where(is_padding | (at.num_rows == 0), first, stop)

    def page_of(block):
        return tables_ref[request, jnp.clip(block, 0, num_blocks - 1)]

    def attend(block, page, offset, state):
        """One step of the running softmax over `keys_per_step` keys of a page."""
        top, total, acc = state
        key = block * block_size + offset + jnp.arange(keys_per_step, dtype=jnp.int32)
        keys = as_read(k_ref[page, kv_head, pl.ds(offset, keys_per_step), :], q.dtype)
        scores = lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        seen = (key[None, :] <= position[:, None]) & (block >= 0)
        scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scales)
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # nothing seen yet: 2 ** (-inf - 0) = 0
        weights = exp2_scaled(scores, scales, shift, interpret=interpret)
        rescale = jnp.exp2(top - shift)
        # what no request owns may be NaN, and 0 * NaN is NaN: such values are read as zeros
        values = plgpu.load(
            v_ref.at[page, kv_head, pl.ds(offset, keys_per_step), :],
            mask=jnp.broadcast_to(((key < kv_len) & (block >= 0))[:, None], (keys_per_step, head_dim)),
            other=0.0,
        )
        values = as_read(values, q.dtype)
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

    def write(result):
        to_row = jnp.where(writes, flat, num_tokens)  # out of range where nothing is written
        plgpu.store(
            out_ref.at[to_row[:, None], (group * rows_per_token + head)[:, None], channel[None, :]],
            result.astype(out_ref.dtype),
            mask=jnp.broadcast_to(writes[:, None], (rows, head_dim)),
        )

    if splits == 1:
        write(result)
    else:
        lse = jnp.where(total == 0, -jnp.inf, top + jnp.log2(jnp.where(total == 0, 1.0, total)))
        merge_last_program(result, lse, merge_refs, (tile_id, group, split), splits, write, interpret=interpret)


def _page_list(
    choice_ref, at: Tile, group, *, pages, blocks, num_blocks, block_size, groups_per_index_head, init_blocks,
    local_blocks,
):  # fmt: skip
    """(function from place in the list to block, length of the list)."""
    own = lax.shift_right_arithmetic(at.first_position + at.num_rows - 1, block_size.bit_length() - 1)
    if pages == "dense":
        return (lambda i: i), own + 1
    if pages == "selected":
        # what a token cannot see names no page of its own

        def chosen(i):
            block = choice_ref[group, at.first_row, jnp.minimum(i, blocks - 1)]
            return jnp.where(block <= own, block, -1)

        return chosen, blocks
    index_head = lax.div(group, groups_per_index_head)
    ranked, rank = rank_blocks(
        lambda block: choice_ref[index_head, at.first_row, block], own, num_blocks,
        init_blocks=init_blocks, local_blocks=local_blocks,
    )  # fmt: skip
    return (lambda i: jnp.sum(jnp.where(rank == i, ranked, 0), dtype=jnp.int32)), jnp.minimum(own + 1, blocks)
