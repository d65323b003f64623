"""Block scores of the index branch in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels.batch import Batch, query_tiles, scatter_rows, tile_size
from minimax_kernels.cache_types import as_read
from minimax_kernels.single_rows import map_rows


def index_score(
    idx_q: Float[Array, "T Hi D"], index_cache: Float[Array, "P B D"], batch: Batch
) -> Float[Array, "Hi T N"]:
    """See `minimax_kernels.index_score`."""
    num_tokens, num_heads, _ = idx_q.shape
    num_blocks, block_size = batch.num_blocks, index_cache.shape[1]
    tiles = query_tiles(batch, num_tokens, tile_size(num_tokens, batch.num_requests))
    tables = jnp.maximum(batch.block_tables, 0)
    key_positions = jnp.arange(num_blocks * block_size).reshape(num_blocks, block_size)

    def score_tile(tile):
        request, rows, positions = tile
        queries = idx_q.at[rows].get(mode="fill", fill_value=0)
        keys = as_read(index_cache[tables[request]], idx_q.dtype)
        scores = jnp.einsum(  # keys first: they stay as they were gathered, while a right operand is transposed
            "nbd,thd->nbth", keys, queries, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        visible = key_positions[..., None] <= positions
        return jnp.where(visible[..., None], scores, -jnp.inf).max(axis=1).transpose(1, 2, 0)

    if tiles.rows.shape[1] == 1:
        scores = map_rows(score_tile, tuple(tiles), num_blocks * index_cache[0].size)
    else:
        scores = jax.lax.map(score_tile, tuple(tiles))
    base = jnp.full((num_tokens, num_heads, num_blocks), -jnp.inf, jnp.float32)
    return scatter_rows(base, tiles.rows, scores).transpose(1, 0, 2)
