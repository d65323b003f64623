"""Causal attention over the whole context of a paged cache in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels.batch import Batch, query_tiles, scatter_rows, tile_size
from minimax_kernels.masked_softmax import masked_attention
from minimax_kernels.single_rows import attend_single_rows


def dense_attention(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Array, "T Hq D"] | None,
) -> Float[Array, "T Hq D"]:
    """See `minimax_kernels.dense_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    tables = jnp.maximum(batch.block_tables, 0)
    tiles = query_tiles(batch, num_tokens, tile_size(num_tokens, batch.num_requests))
    key_positions = jnp.arange(batch.num_blocks * block_size)
    base = jnp.zeros_like(q) if out is None else out
    if tiles.rows.shape[1] == 1:
        rows = q.at[tiles.rows[:, 0]].get(mode="fill", fill_value=0)
        rows = rows.reshape(-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        pages = jnp.repeat(tables[tiles.request][:, None], num_kv_heads, axis=1)
        starts = jnp.broadcast_to(jnp.arange(batch.num_blocks) * block_size, pages.shape)
        attended = attend_single_rows(rows, k_cache, v_cache, pages, starts, tiles.positions[:, 0], scale=scale)
        return scatter_rows(base, tiles.rows, attended.reshape(-1, 1, num_heads, head_dim))

    def attend_tile(tile):
        request, rows, positions = tile
        queries = q.at[rows].get(mode="fill", fill_value=0)
        queries = queries.reshape(rows.shape[0], num_kv_heads, num_heads // num_kv_heads, head_dim)
        pages = tables[request]
        keys = k_cache[pages].swapaxes(0, 1).reshape(num_kv_heads, -1, head_dim)
        values = v_cache[pages].swapaxes(0, 1).reshape(num_kv_heads, -1, head_dim)
        mask = jnp.broadcast_to(key_positions <= positions[:, None], (num_kv_heads, rows.shape[0], keys.shape[1]))
        attended = masked_attention(queries, keys, values, mask, scale)
        return attended.reshape(rows.shape[0], num_heads, head_dim)

    attended = jax.lax.map(jax.checkpoint(attend_tile), tuple(tiles))
    return scatter_rows(base, tiles.rows, attended)
