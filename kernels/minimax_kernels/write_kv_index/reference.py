"""Cache writes of a sparse layer in plain jnp."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels.write_index.reference import write_index
from minimax_kernels.write_kv.reference import write_kv


def write_kv_index(
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    index_cache: Float[Array, "P B Di"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    idx_k: Float[Array, "T Di"],
    slots: Int[Array, "T"],
) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"], Float[Array, "P B Di"]]:
    """See `minimax_kernels.write_kv_index`."""
    return *write_kv(k_cache, v_cache, k, v, slots), write_index(index_cache, idx_k, slots)
