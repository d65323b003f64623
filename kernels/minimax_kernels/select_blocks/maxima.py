"""Selection by repeated maxima over registers: for rows with more candidates than cells (many equal scores).

A row is read in chunks. The best so far are held as (key, block) pairs; while a chunk's maximum beats the worst of
them, it takes that one's place. The first chunk costs topk rounds, each later one as many as it has new entries to
offer, a few for most rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minimax_kernels.select_blocks.sortable import LOWEST, NAN, choice_keys
from minimax_kernels.triton_call import ceil_div, next_power_of_two

HELD_BY_PROGRAM = 1024  # scores at a time, at most
_NO_BLOCK = 2**31 - 1


def choose_by_maxima(
    load: Callable[[Int[Array, "N"]], Float[Array, "N"]],
    own: jax.Array,
    *,
    num_blocks: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Int[Array, "topk"]:
    """The selection of one row with at least `topk` visible blocks, padded to a power of two.

    Args:
      load: scores of the given blocks, -inf for those past the last.
      own: the token's own block, one less than there are visible ones.
    """
    chunk = min(next_power_of_two(num_blocks), HELD_BY_PROGRAM)
    lane = jnp.arange(chunk, dtype=jnp.int32)
    width = next_power_of_two(topk)
    slot = jnp.arange(width, dtype=jnp.int32)
    best_key = jnp.where(slot < topk, LOWEST, NAN)  # lanes past topk are never the worst
    best_block = jnp.full((width,), -1, jnp.int32)

    def keys_of(i):
        block = i * chunk + lane
        values = load(block)
        return block, choice_keys(values, values != -jnp.inf, block, own, init_blocks, local_blocks)

    def fill(i, state):
        """The first chunk: its maximum goes to the next slot."""
        keys, best_key, best_block = state
        top = jnp.max(keys)
        taken = jnp.min(jnp.where(keys == top, block, _NO_BLOCK))  # of equal keys the lower block
        here = slot == i
        keys = jnp.where(block == taken, LOWEST, keys)
        return keys, jnp.where(here, top, best_key), jnp.where(here, taken, best_block)

    block, keys = keys_of(0)
    keys, best_key, best_block = lax.fori_loop(0, topk, fill, (keys, best_key, best_block))
    if num_blocks > chunk:

        def merge_chunk(i, best):
            block, keys = keys_of(i)
            return _take_best(keys, block, *best)

        best_key, best_block = lax.fori_loop(1, ceil_div(num_blocks, chunk), merge_chunk, (best_key, best_block))
    return best_block


def _take_best(keys, block, best_key, best_block):
    """Merges a chunk of candidates into the best so far; blocks of a chunk are higher than those held."""
    slot = jnp.arange(best_key.shape[0], dtype=jnp.int32)

    def better(state):
        _, _, _, top, worst = state
        return top > worst

    def replace(state):
        keys, best_key, best_block, top, worst = state
        taken = jnp.min(jnp.where(keys == top, block, _NO_BLOCK))  # of equal keys the lower block
        # of equally bad ones the highest block goes
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
