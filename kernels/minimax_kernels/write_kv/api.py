"""write_kv: new keys and values into their pages."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.write_kv import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.write_kv, reference.write_kv)


def write_kv(
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    slots: Int[Array, "T"],
    *,
    impl: str | None = None,
) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"]]:
    """Writes each token's key and value to its slot; in place when the caches are donated.

    Args:
      k_cache, v_cache: pages of B tokens; float32, bfloat16, float16 or float8_e4m3fn (`cache_types`).
      k, v: new keys and values; rounded to the caches' type, for e4m3 cut off at 448, and NaN stays NaN.
      slots: page * B + offset of each token; -1 is skipped.
      impl: None for the best that can serve, or a name.

    Returns:
      The two caches.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    check_kv_rows(k_cache, v_cache, k, v, slots)
    return dispatch("write_kv", _IMPLEMENTATIONS, impl, k_cache, v_cache, k, v, slots)


def check_kv_rows(k_cache: Array, v_cache: Array, k: Array, v: Array, slots: Array) -> None:
    """What the writes of keys and values ask of their operands."""
    checks.check_pair(k_cache, v_cache)
    checks.check_rank("k", k, "[T, Hkv, D]")
    checks.check_rank("slots", slots, "[T]")
    checks.check_int("slots", slots)
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}: must be {k.shape}, as k")
    checks.check_extent("k", "Hkv", k.shape[1], k_cache.shape[1], "in k_cache")
    checks.check_extent("k", "D", k.shape[2], k_cache.shape[3], "in k_cache")
    checks.check_extent("slots", "T", slots.shape[0], k.shape[0], "in k")
