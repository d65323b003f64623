"""Exact top-k selection of blocks: one warp a row of scores, by repeated maximum over registers.

A row is read in chunks. The best so far are held as (key, block) pairs; while a chunk's maximum beats the worst of
them, it takes that one's place. The first chunk costs topk rounds, each later one as many as it has new
entries to offer, a few for most rows. Keys are integers in the order of the scores, so that ties, NaN and forced
blocks are plain comparisons.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.batch import Batch
from minimax_kernels.launch_table import SELECT_CHUNK, SELECT_LAUNCH
from minimax_kernels.triton_call import next_power_of_two, triton_call

LOWEST = -(2**31)  # key of what cannot be chosen
FORCED = 0x7F800000  # key of +inf: above every number, below NaN
_NAN = 0x7FFFFFFF
_NO_BLOCK = 2**31 - 1


def select_blocks(
    scores: Float[Array, "Hi T N"],
    batch: Batch,
    *,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    interpret: bool = False,
) -> Int[Array, "Hi T topk"]:
    """See `minimax_kernels.select_blocks`."""
    num_heads, num_tokens, num_blocks = scores.shape
    if topk > 64:
        raise NotImplementedError(f"pallas_triton: topk = {topk} is more than 64")
    kernel = functools.partial(
        _select_kernel,
        num_tokens=num_tokens,
        num_blocks=num_blocks,
        chunk=min(next_power_of_two(num_blocks), SELECT_CHUNK),
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
    return triton_call(
        kernel,
        (scores.astype(jnp.float32), batch.query_starts),
        jax.ShapeDtypeStruct((num_heads, num_tokens, topk), jnp.int32),
        grid=(num_tokens, num_heads),
        launch=SELECT_LAUNCH,
        name="select_blocks",
        interpret=interpret,
    )


def sortable(scores: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of float32 scores: -0.0 equals 0.0, NaN is above everything."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    ordered = bits ^ (lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF)
    return jnp.where(scores != scores, _NAN, ordered)


def _select_kernel(scores_ref, starts_ref, out_ref, *, num_tokens, num_blocks, chunk, topk, init_blocks, local_blocks):
    row, head = pl.program_id(0), pl.program_id(1)
    num_live = starts_ref[starts_ref.shape[0] - 1]
    num_chunks = -(-num_blocks // chunk)
    lane = jnp.arange(chunk, dtype=jnp.int32)

    def load(first):
        block = first + lane
        inside = block < num_blocks
        values = plgpu.load(
            scores_ref.at[head, row, jnp.minimum(block, num_blocks - 1)], mask=inside & (row < num_live), other=-jnp.inf
        )
        return block, values

    # the token's own block: the visible ones are 0 .. own
    if num_chunks == 1:
        own = jnp.sum(load(0)[1] != -jnp.inf, dtype=jnp.int32) - 1
    else:

        def count(i, visible):
            return visible + jnp.sum(load(i * chunk)[1] != -jnp.inf, dtype=jnp.int32)

        own = lax.fori_loop(0, num_chunks, count, jnp.int32(0)) - 1
        chunks = (own + chunk) // chunk  # what is past the own block is not visible

    width = next_power_of_two(topk)
    slot = jnp.arange(width, dtype=jnp.int32)
    best_key = jnp.where(slot < topk, LOWEST, _NAN)  # lanes past topk are never the worst
    best_block = jnp.full((width,), -1, jnp.int32)

    def keys_of(i):
        block, values = load(i * chunk)
        visible = values != -jnp.inf
        forced = visible & ((block < init_blocks) | (block > own - local_blocks))
        return block, jnp.where(forced, FORCED, jnp.where(visible, sortable(values), LOWEST))

    def fill(i, state):
        """The first chunk: its maximum goes to the next slot."""
        keys, best_key, best_block = state
        top = jnp.max(keys)
        taken = jnp.min(jnp.where(keys == top, block, _NO_BLOCK))  # of equal keys the lower block
        here = (slot == i) & (top > LOWEST)
        keys = jnp.where(block == taken, LOWEST, keys)
        return keys, jnp.where(here, top, best_key), jnp.where(here, taken, best_block)

    block, keys = keys_of(0)
    rounds = jnp.clip(own + 1, 0, topk)
    keys, best_key, best_block = lax.fori_loop(0, rounds, fill, (keys, best_key, best_block))
    if num_chunks > 1:

        def merge_chunk(i, best):
            block, keys = keys_of(i)
            return take_best(keys, block, *best)

        best_key, best_block = lax.fori_loop(1, chunks, merge_chunk, (best_key, best_block))
    store_at = jnp.where(slot < topk, slot, topk)
    plgpu.store(out_ref.at[head, row, store_at], best_block, mask=slot < topk)


def take_best(keys, block, best_key, best_block):
    """Merges a chunk of candidates into the best so far; blocks of a chunk are higher than those held."""
    slot = jnp.arange(best_key.shape[0], dtype=jnp.int32)

    def better(state):
        _, _, _, top, worst = state
        return top > worst

    def replace(state):
        keys, best_key, best_block, top, worst = state
        taken = jnp.min(jnp.where(keys == top, block, _NO_BLOCK))  # of equal keys the lower block
        # of equally bad ones the highest block goes; free slots (block -1) fill up from the left
        is_worst = best_key == worst
        evicted = jnp.max(jnp.where(is_worst, best_block, -1))
        place = jnp.min(jnp.where(is_worst & (best_block == evicted), slot, _NO_BLOCK))
        best_key = jnp.where(slot == place, top, best_key)
        best_block = jnp.where(slot == place, taken, best_block)
        keys = jnp.where(block == taken, LOWEST, keys)
        return keys, best_key, best_block, jnp.max(keys), jnp.min(best_key)

    state = (keys, best_key, best_block, jnp.max(keys), jnp.min(best_key))
    _, best_key, best_block, _, _ = lax.while_loop(better, replace, state)
    return best_key, best_block
