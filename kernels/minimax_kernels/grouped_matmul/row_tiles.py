"""Sorted rows in eights, and their cut into tiles of one group each: a table that several kernels then read.

The copy engine moves tiles of eight rows, so rows that it reads lie so that each group starts at a multiple of eight;
what is between two groups is never written, and nothing that is read of it reaches a result.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from minimax_kernels.group_tiles import num_group_tiles
from minimax_kernels.triton_call import Launch, ceil_div, next_power_of_two, triton_call

EIGHT = 8  # rows of what the copy engine moves
ENTRIES = 32  # of a program
FIELDS = 5
LAUNCH = Launch(num_warps=4, num_stages=1)


def rows_in_eights(num_rows: int, num_groups: int) -> int:
    """How many rows groups take that start at multiples of eight."""
    return ceil_div(num_rows + min(num_groups, num_rows) * (EIGHT - 1), EIGHT) * EIGHT


def group_starts(sizes_ref: Any, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Device side: (sizes, first sorted row, first row in eights) of each group, padded to a power of two.

    Args:
      num_rows: sizes count as far as there are rows.
    """
    num_groups = sizes_ref.shape[0]
    group = jnp.arange(next_power_of_two(num_groups), dtype=jnp.int32)
    sizes = jnp.where(group < num_groups, sizes_ref[jnp.minimum(group, num_groups - 1)], 0)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = jnp.minimum(ends - sizes, num_rows)
    sizes = jnp.minimum(ends, num_rows) - starts
    eights = lax.div(sizes + (EIGHT - 1), EIGHT) * EIGHT
    return sizes, starts, jnp.cumsum(eights, dtype=jnp.int32) - eights


def cut_rows(
    group_sizes: Int[Array, "E"], num_rows: int, widths: tuple[int, ...], *, interpret: bool
) -> Int[Array, "tiles+1 5"]:
    """Entries (group, number of rows, index into widths, first row in eights, first sorted row), widest tiles first.

    A group's rows are shared evenly, in eights, among as few tiles as hold them; a tile has the least width that its
    rows fit. Entry 0 has the number of tiles in its first field; what is past the last tile is not written.

    Args:
      num_rows: sizes count as far as there are rows.
      widths: descending, multiples of 8.
    """
    entries = 1 + num_group_tiles(num_rows, group_sizes.shape[0], widths[0], rest=False)
    return triton_call(
        functools.partial(_cut_kernel, num_rows=num_rows, widths=widths),
        [group_sizes],
        jax.ShapeDtypeStruct((entries, FIELDS), jnp.int32),
        grid=(ceil_div(entries, ENTRIES),),
        launch=LAUNCH,
        name="cut_rows",
        interpret=interpret,
    )


def _cut_kernel(sizes_ref: Any, tiles_ref: Any, *, num_rows: int, widths: tuple[int, ...]) -> None:
    sizes, starts, starts_in_eights = group_starts(sizes_ref, num_rows)
    group = jnp.arange(sizes.shape[0], dtype=jnp.int32)
    tiles = lax.div(sizes + (widths[0] - 1), widths[0])
    share = lax.div(sizes + EIGHT * tiles - 1, EIGHT * jnp.maximum(tiles, 1)) * EIGHT
    width = sum(((share <= width).astype(jnp.int32) for width in widths[1:]), jnp.zeros_like(share))

    order = width * group.shape[0] + group
    before = jnp.sum(jnp.where(order[None, :] < order[:, None], tiles[None, :], 0), axis=1, dtype=jnp.int32)
    entry = pl.program_id(0) * ENTRIES + jnp.arange(ENTRIES, dtype=jnp.int32)
    within = (entry - 1)[:, None] - before[None, :]  # which of a group's tiles an entry would be
    its = (within >= 0) & (within < tiles[None, :])

    def of_its(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(its, values, 0), axis=1, dtype=jnp.int32)

    offset = within * share[None, :]
    count = jnp.sum(tiles, dtype=jnp.int32)
    fields = (
        jnp.where(entry == 0, count, of_its(jnp.broadcast_to(group[None, :], its.shape))),
        of_its(jnp.clip(sizes[None, :] - offset, 0, share[None, :])),
        of_its(jnp.broadcast_to(width[None, :], its.shape)),
        of_its(starts_in_eights[None, :] + offset),
        of_its(starts[None, :] + offset),
    )
    for i, field in enumerate(fields):
        at = jnp.minimum(entry, tiles_ref.shape[0]), jnp.full_like(entry, i)
        plgpu.store(tiles_ref.at[at], field, mask=(entry <= count) & (entry < tiles_ref.shape[0]))
