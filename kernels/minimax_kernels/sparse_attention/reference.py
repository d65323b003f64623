"""Attention over selected blocks in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.batch import Batch, query_tiles, scatter_rows, tile_size
from minimax_kernels.masked_softmax import masked_attention
from minimax_kernels.single_rows import NOWHERE, attend_single_rows


def sparse_attention(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    selected: Int[Array, "S T topk"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Array, "T Hq D"] | None,
) -> Float[Array, "T Hq D"]:
    """See `minimax_kernels.sparse_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    selected = selected[..., : batch.num_blocks]  # valid ids come first, so the rest are -1
    num_selections, num_kv_heads, block_size = selected.shape[0], k_cache.shape[1], k_cache.shape[2]
    kv_head = jnp.arange(num_selections) * num_kv_heads // num_selections
    tables = jnp.maximum(batch.block_tables, 0)
    tiles = query_tiles(batch, num_tokens, tile_size(num_tokens, batch.num_requests))
    base = jnp.zeros_like(q) if out is None else out
    if tiles.rows.shape[1] == 1:  # one query: read its own blocks only
        rows = q.at[tiles.rows[:, 0]].get(mode="fill", fill_value=0)
        rows = rows.reshape(-1, num_selections, num_heads // num_selections, head_dim)
        blocks = selected.at[:, tiles.rows[:, 0]].get(mode="fill", fill_value=-1).swapaxes(0, 1)  # [T, S, topk]
        pages = tables[tiles.request[:, None, None], jnp.maximum(blocks, 0)]
        starts = jnp.where(blocks >= 0, blocks * block_size, NOWHERE)
        attended = attend_single_rows(rows, k_cache, v_cache, pages, starts, tiles.positions[:, 0], scale=scale)
        return scatter_rows(base, tiles.rows, attended.reshape(-1, 1, num_heads, head_dim))

    def attend_tile(tile):
        request, rows, positions = tile
        queries = q.at[rows].get(mode="fill", fill_value=0)
        queries = queries.reshape(rows.shape[0], num_selections, num_heads // num_selections, head_dim)
        chosen = selected.at[:, rows].get(mode="fill", fill_value=-1)  # [S, TQ, topk]
        blocks = jnp.broadcast_to(jnp.arange(batch.num_blocks), (num_selections, batch.num_blocks))
        member = (chosen[..., None] == jnp.arange(batch.num_blocks)).any(axis=2)
        pages = tables[request][blocks]
        keys = k_cache[pages, kv_head[:, None]].reshape(num_selections, -1, head_dim)
        values = v_cache[pages, kv_head[:, None]].reshape(num_selections, -1, head_dim)
        key_positions = (blocks[..., None] * block_size + jnp.arange(block_size)).reshape(num_selections, 1, -1)
        mask = jnp.repeat(member, block_size, axis=-1) & (key_positions <= positions[:, None])
        attended = masked_attention(queries, keys, values, mask, scale)
        return attended.reshape(rows.shape[0], num_heads, head_dim)

    attended = jax.lax.map(jax.checkpoint(attend_tile), tuple(tiles))
    return scatter_rows(base, tiles.rows, attended)
