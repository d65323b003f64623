"""Selection inside another kernel: each block's rank among the visible ones, all at once.

Counting who beats whom takes N * N comparisons, but no step waits for another: for a few hundred blocks that is
faster than topk rounds of a maximum, and saves a launch.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minimax_kernels.select_blocks.sortable import choice_keys
from minimax_kernels.triton_call import next_power_of_two

RIVALS = 16  # blocks compared against all others in one step


def rank_blocks(
    load: Callable[[Int[Array, "..."]], Float[Array, "..."]],
    own: jax.Array,
    num_blocks: int,
    *,
    init_blocks: int,
    local_blocks: int,
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """Ranks the blocks 0 .. own by score, forced ones first and of equal ones the lower block.

    Args:
      load: scores of the given blocks.
      own: the token's own block, the last visible one; -1 for none.
      num_blocks: how many blocks there are scores for.

    Returns:
      (blocks, their ranks), padded to a power of two; a block that is not visible has no rank (a huge number).
    """

    def keys(block):
        scores = load(jnp.minimum(block, num_blocks - 1))
        return choice_keys(scores, block <= own, block, own, init_blocks, local_blocks)

    blocks = jnp.arange(next_power_of_two(num_blocks), dtype=jnp.int32)
    mine = keys(blocks)[None, :]

    def count(step, better):
        rival = step * RIVALS + jnp.arange(RIVALS, dtype=jnp.int32)
        theirs = keys(rival)[:, None]
        wins = (theirs > mine) | ((theirs == mine) & (rival[:, None] < blocks[None, :]))
        return better + wins.astype(jnp.int32)

    steps = lax.div(own + RIVALS, RIVALS)
    better = lax.fori_loop(0, steps, count, jnp.zeros((RIVALS, blocks.shape[0]), jnp.int32))
    return blocks, jnp.where(blocks <= own, jnp.sum(better, axis=0, dtype=jnp.int32), 2**30)
