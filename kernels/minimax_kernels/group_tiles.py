"""Device side: which group a tile of sorted rows belongs to, found inside a kernel from the sizes of the groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from minimax_kernels.triton_call import is_power_of_two, next_power_of_two


class GroupTile(NamedTuple):
    """Rows of one group, all scalars.

    Attributes:
      group: the group; num_groups for rows past the last group's, and for tiles past the last row.
      first_row: the tile's first sorted row.
      num_rows: rows in the tile; 0 past the last tile.
    """

    group: jax.Array
    first_row: jax.Array
    num_rows: jax.Array


def num_group_tiles(num_rows: int, num_groups: int, tile: int, *, rest: bool) -> int:
    """A static bound of the tiles that `num_rows` rows make, however they fall to the groups.

    Args:
      rest: rows past the last group's make tiles too.
    """
    groups = min(num_groups + 1 if rest else num_groups, num_rows)
    return (num_rows + groups * (tile - 1)) // tile


def locate_group(sizes_ref: Any, tile_id: jax.Array, *, tile: int, num_rows: int, num_groups: int) -> GroupTile:
    """Finds tile `tile_id` when each group's rows, then the rest up to `num_rows`, are cut into tiles of `tile` rows.

    One vector load and two prefix sums: no table made beforehand, hence no launch before the kernel.
    """
    assert is_power_of_two(tile), tile
    ids = jnp.arange(next_power_of_two(num_groups + 1), dtype=jnp.int32)
    sizes = jnp.where(ids < num_groups, sizes_ref[jnp.minimum(ids, num_groups - 1)], 0)
    sizes = jnp.where(ids == num_groups, num_rows - jnp.sum(sizes, dtype=jnp.int32), sizes)
    tiles = lax.shift_right_arithmetic(sizes + (tile - 1), tile.bit_length() - 1)
    before = jnp.cumsum(tiles, dtype=jnp.int32) <= tile_id
    group = jnp.minimum(jnp.sum(before, dtype=jnp.int32), num_groups)

    def total(x: jax.Array, chosen: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen, x, 0), dtype=jnp.int32)

    offset = (tile_id - total(tiles, before & (ids < num_groups))) * tile
    size = total(sizes, ids == group)
    first_row = total(sizes, ids < group) + offset
    return GroupTile(group, first_row, jnp.clip(jnp.minimum(size - offset, num_rows - first_row), 0, tile))
