"""Selection of the few that matter: the kernel's common case, two passes over a row of scores, no repeated search.

First pass: block b belongs to group b mod G (G >= 2 topk), and each group keeps its largest key. The topk-th largest of
those maxima is a bound that at least topk blocks reach, and for scores without order hardly more do: topk 16 of any
number of blocks leaves some 22. Second pass: those that reach it, and the forced ones, are written side by side into a
row of G cells. There each counts who beats it, and its rank is its place in the result.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.select_blocks.sortable import FORCED, HIDDEN, is_forced, sortable
from minimax_kernels.triton_call import ceil_div, next_power_of_two

HELD_BY_THREAD = 32  # scores at a time, at most
RIVALS = 8  # candidates that all others are compared with in one step


def num_cells(topk: int) -> int:
    """G, the groups and the room for candidates; at least a warp's lanes."""
    return max(32, next_power_of_two(2 * topk))


def choose_candidates(
    load: Callable[[Int[Array, "K G"]], Float[Array, "K G"]],
    cells_ref,
    out_ref,
    place: tuple[jax.Array, jax.Array],
    *,
    num_blocks: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    num_warps: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Writes the selection of one row, where its candidates fit their cells.

    Args:
      load: scores of the given blocks, -inf for those past the last.
      cells_ref: [Hi, T, 2, G] int32, room for keys and blocks.
      out_ref: [Hi, T, topk] int32.
      place: (index head, row).

    Returns:
      (number of candidates, the token's own block or -1). Nothing was written where the number is above G.
    """
    head, row = place
    groups = num_cells(topk)
    rows = min(next_power_of_two(ceil_div(num_blocks, groups)), HELD_BY_THREAD * num_warps * 32 // groups)
    chunk, chunks = rows * groups, ceil_div(num_blocks, rows * groups)
    shape = (rows, groups)
    offset = lax.broadcasted_iota(jnp.int32, shape, 0) * groups + lax.broadcasted_iota(jnp.int32, shape, 1)

    def keys_of(i):
        return sortable(load(i * chunk + offset))  # what is not visible has the score -inf

    def survey(i, keys, state):
        most, visible, stop = state
        seen = jnp.sum((keys != HIDDEN).astype(jnp.int32), axis=0)
        return jnp.maximum(most, jnp.max(keys, axis=0)), visible + seen, jnp.where(seen > 0, i + 1, stop)

    nothing = jnp.zeros((groups,), jnp.int32)
    first = keys_of(0)  # stays in registers
    state = survey(0, first, (jnp.full((groups,), HIDDEN, jnp.int32), nothing, nothing))
    if chunks > 1:
        state = lax.fori_loop(1, chunks, lambda i, state: survey(i, keys_of(i), state), state)
    most, visible, stop = state
    own = jnp.sum(visible, dtype=jnp.int32) - 1

    def lower(_, state):
        most, _ = state
        top = jnp.max(most)
        return jnp.where(most == top, HIDDEN, most), top  # equal maxima go together: the bound is lower then

    _, bound = lax.fori_loop(0, topk, lower, (most, jnp.int32(HIDDEN)))
    bound = jnp.clip(bound, HIDDEN + 1, FORCED)  # a NaN may be a forced block's, whose key is lower

    def gather(i, keys, count):
        block = i * chunk + offset
        forced = is_forced(block, own, init_blocks, local_blocks)
        keys = jnp.where(forced & (keys != HIDDEN), FORCED, keys)
        reaches = keys >= bound  # all forced ones do
        reach = reaches.astype(jnp.int32)
        in_group = jnp.cumsum(reach, axis=0, dtype=jnp.int32)
        of_group = jnp.sum(reach, axis=0)
        before = count + jnp.cumsum(of_group, dtype=jnp.int32) - of_group
        cell = before[None, :] + in_group - reach
        fits = reaches & (cell < groups)
        if interpret:  # where masked stores write too, what was there
            cell = jnp.where(fits, cell, groups)  # out of range where nothing is written
        plgpu.store(cells_ref.at[head, row, 0, cell], keys, mask=fits)
        plgpu.store(cells_ref.at[head, row, 1, cell], block, mask=fits)
        return count + jnp.sum(of_group, dtype=jnp.int32)

    count = gather(0, first, jnp.int32(0))
    if chunks > 1:
        # past the last chunk with a visible block there is nothing to gather
        count = lax.fori_loop(1, jnp.max(stop), lambda i, count: gather(i, keys_of(i), count), count)

    @pl.when(count <= groups)
    def _rank():
        if not interpret:
            plgpu.debug_barrier()  # the cells are read by other threads than wrote them
        cell = jnp.arange(groups, dtype=jnp.int32)
        held = cell < count

        def read(cells, kind, other):
            inside = cells < count
            return plgpu.load(cells_ref.at[head, row, kind, cells], mask=inside, other=other)

        key, block = read(cell, 0, HIDDEN)[None, :], read(cell, 1, -1)[None, :]

        def beaten(step, better):
            rival = step * RIVALS + jnp.arange(RIVALS, dtype=jnp.int32)
            their_key, their_block = read(rival, 0, HIDDEN)[:, None], read(rival, 1, -1)[:, None]
            wins = (their_key > key) | ((their_key == key) & (their_block < block))  # of equal keys the lower block
            return better + wins.astype(jnp.int32)

        steps = lax.div(count + (RIVALS - 1), RIVALS)
        better = lax.fori_loop(0, steps, beaten, jnp.zeros((RIVALS, groups), jnp.int32))
        rank = jnp.where(held, jnp.sum(better, axis=0, dtype=jnp.int32), cell)  # what is left over is empty
        writes = rank < topk
        to = jnp.where(writes, rank, topk)  # out of range where nothing is written
        plgpu.store(out_ref.at[head, row, to], jnp.where(held, block[0], -1), mask=writes)

    return count, own
