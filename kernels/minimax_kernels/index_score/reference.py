"""Block scores of the index branch in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels.batch import Batch, query_tiles, scatter_rows, tile_size
from minimax_kernels.cache_types import as_read


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
        scores = jnp.einsum(
            "thd,nbd->thnb", queries, keys, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        visible = key_positions <= positions[:, None, None, None]
        return jnp.where(visible, scores, -jnp.inf).max(axis=-1)

    scores = jax.lax.map(score_tile, tuple(tiles))
    base = jnp.full((num_tokens, num_heads, num_blocks), -jnp.inf, jnp.float32)
    return scatter_rows(base, tiles.rows, scores).transpose(1, 0, 2)
