"""write_kv: keys and values in one launch."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels.write_pages import write_pages


def write_kv(
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    slots: Int[Array, "T"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"]]:
    """See `minimax_kernels.write_kv`."""
    k_cache, v_cache = write_pages((k_cache, v_cache), (k, v), slots, interpret=interpret)
    return k_cache, v_cache
