"""Cache writes in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.cache_types import as_stored


def write_kv(
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    slots: Int[Array, "T"],
) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"]]:
    """See `minimax_kernels.write_kv`."""
    num_pages, _, block_size, _ = k_cache.shape
    page = jnp.where(slots < 0, num_pages, slots // block_size)  # out of range is dropped, -1 would wrap
    offset = slots % block_size
    k_cache = k_cache.at[page, :, offset].set(as_stored(k, k_cache.dtype), mode="drop")
    v_cache = v_cache.at[page, :, offset].set(as_stored(v, v_cache.dtype), mode="drop")
    return k_cache, v_cache
