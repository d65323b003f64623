"""Index-key cache writes in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.cache_types import as_stored


def write_index(
    index_cache: Float[Array, "P B D"], idx_k: Float[Array, "T D"], slots: Int[Array, "T"]
) -> Float[Array, "P B D"]:
    """See `minimax_kernels.write_index`."""
    num_pages, block_size, _ = index_cache.shape
    page = jnp.where(slots < 0, num_pages, slots // block_size)
    return index_cache.at[page, slots % block_size].set(as_stored(idx_k, index_cache.dtype), mode="drop")
