"""Requests with one token each in plain jnp: several rows in one product, as many as stay in a CPU's caches.

The references go through tiles of query rows one by one, which bounds their memory. Where each tile is one token, as in
decoding, a tile is little work, and what it costs is the way there and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minimax_kernels.cache_types import as_read

_ELEMENTS = 1 << 20  # of gathered keys in one product; four times as many took longer than row after row


def attend_single_rows(
    q: Float[Array, "T S G D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    pages: Int[Array, "T S M"],
    visible: Bool[Array, "T S M B"],
    *,
    scale: float,
) -> Float[Array, "T S G D"]:
    """Softmax attention of each token over M pages of its own in float32; a row that sees nothing gives zeros.

    Args:
      q: G query heads for each of S selections, which share KV heads evenly.
      visible: which keys of a page a token sees. What it does not see may be NaN.
    """
    num_selections, num_pages = pages.shape[1:]
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    kv_head = (jnp.arange(num_selections) * num_kv_heads // num_selections)[:, None]

    def attend(row):
        queries, pages, visible = row
        keys, values = as_read(k_cache[pages, kv_head], q.dtype), v_cache[pages, kv_head]  # [S, M, B, D]
        values = jnp.where(visible[..., None], values, 0).astype(jnp.float32)
        # a product for each page: the keys stay as they were gathered
        exact = jax.lax.Precision.HIGHEST
        by_page = jnp.broadcast_to(queries[:, None], (num_selections, num_pages, *queries.shape[1:]))
        scores = jnp.einsum("smgd,smbd->smgb", by_page, keys, precision=exact, preferred_element_type=jnp.float32)
        mask = visible[:, :, None]
        scores = jnp.where(mask, scores * scale, -jnp.inf)
        top = jnp.maximum(scores.max(axis=(1, 3), keepdims=True), jnp.finfo(jnp.float32).min)
        weights = jnp.where(mask, jnp.exp(scores - jax.lax.stop_gradient(top)), 0.0)
        total = weights.sum(axis=(1, 3), keepdims=True)
        weights = weights / jnp.where(total == 0, 1.0, total)
        parts = jnp.einsum("smgb,smbd->smgd", weights, values, precision=exact, preferred_element_type=jnp.float32)
        return parts.sum(axis=1)

    return map_rows(jax.checkpoint(attend), (q, pages, visible), num_selections * num_pages * block_size * head_dim)


def map_rows(fn: Callable[[Any], Array], rows: Any, num_elements: int) -> Array:
    """`fn` of each row (axis 0 of all arrays in `rows`), of which several run together.

    Args:
      num_elements: that a row gathers.
    """
    num_rows, at_once = jax.tree.leaves(rows)[0].shape[0], _ELEMENTS // num_elements
    if at_once >= num_rows:
        return jax.vmap(fn)(rows)
    return jax.lax.map(fn, rows, batch_size=at_once if at_once > 1 else None)
