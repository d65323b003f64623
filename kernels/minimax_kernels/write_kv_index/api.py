"""write_kv_index: new keys, values and index keys of a sparse layer into their pages."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.write_index.api import check_index_rows
from minimax_kernels.write_kv.api import check_kv_rows
from minimax_kernels.write_kv_index import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.write_kv_index, reference.write_kv_index)


def write_kv_index(
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    index_cache: Float[Array, "P B Di"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    idx_k: Float[Array, "T 1 Di"] | Float[Array, "T Di"],
    slots: Int[Array, "T"],
    *,
    impl: str | None = None,
) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"], Float[Array, "P B Di"]]:
    """`write_kv` and `write_index` of the same slots in one launch.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    check_kv_rows(k_cache, v_cache, k, v, slots)
    idx_k = check_index_rows(index_cache, idx_k, slots)
    checks.check_extent("index_cache", "B", index_cache.shape[1], k_cache.shape[2], "in k_cache")
    caches = (k_cache, v_cache, index_cache)
    return dispatch("write_kv_index", _IMPLEMENTATIONS, impl, *caches, k, v, idx_k, slots)
