"""write_kv_index: three caches in one launch."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels.write_pages import write_pages


def write_kv_index(
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    index_cache: Float[Array, "P B Di"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    idx_k: Float[Array, "T Di"],
    slots: Int[Array, "T"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"], Float[Array, "P B Di"]]:
    """See `minimax_kernels.write_kv_index`."""
    caches, rows = (k_cache, v_cache, index_cache[:, None]), (k, v, idx_k[:, None])
    k_cache, v_cache, written = write_pages(caches, rows, slots, interpret=interpret)
    return k_cache, v_cache, written[:, 0]
