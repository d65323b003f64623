"""Grouped matrix products in plain jnp: rows in tiles of one group each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.mxfp8 import Mxfp8, dequantize

_BATCHED_WEIGHT_LIMIT = 1 << 26  # gathered weight elements up to which all tiles run as one batched product


def grouped_matmul(
    x: Float[Array, "T K"], w: Float[Array, "E K N"] | Mxfp8, group_sizes: Int[Array, "E"]
) -> Float[Array, "T N"]:
    """See `minimax_kernels.grouped_matmul`."""
    num_rows, in_features = x.shape
    num_groups, _, out_features = w.shape
    tile = min(128, 1 << max(num_rows // (2 * num_groups), 1).bit_length() - 1)
    num_tiles = num_rows if tile == 1 else num_rows // tile + min(num_groups, num_rows)
    ends = jnp.cumsum(group_sizes)
    tile_ends = jnp.cumsum((group_sizes + tile - 1) // tile)
    ids = jnp.arange(num_tiles)
    group = jnp.minimum(jnp.searchsorted(tile_ends, ids, side="right"), num_groups - 1)
    tile_starts = tile_ends - (group_sizes + tile - 1) // tile
    offsets = (ids - tile_starts[group])[:, None] * tile + jnp.arange(tile)
    live = (offsets < group_sizes[group][:, None]) & (ids < tile_ends[-1])[:, None]
    rows = jnp.where(live, (ends - group_sizes)[group][:, None] + offsets, num_rows)

    def multiply(tile):
        tile_rows, tile_group = tile
        taken = jax.tree.map(lambda leaf: leaf[tile_group], w)
        matrix = dequantize(taken, x.dtype) if isinstance(taken, Mxfp8) else taken
        precision = jax.lax.Precision.HIGHEST if jnp.float32 in (x.dtype, matrix.dtype) else None
        inputs = x.at[tile_rows].get(mode="fill", fill_value=0)
        return jnp.matmul(inputs, matrix, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)

    if num_tiles * in_features * out_features <= _BATCHED_WEIGHT_LIMIT:
        products = jax.vmap(multiply)((rows, group))
    else:
        products = jax.lax.map(multiply, (rows, group))
    result = jnp.zeros((num_rows, out_features), x.dtype)
    return result.at[rows.reshape(-1)].set(products.reshape(-1, out_features), mode="drop")
