"""write_index: new index keys into their pages."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.write_index import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.write_index, reference.write_index)


def write_index(
    index_cache: Float[Array, "P B D"],
    idx_k: Float[Array, "T 1 D"] | Float[Array, "T D"],
    slots: Int[Array, "T"],
    *,
    impl: str | None = None,
) -> Float[Array, "P B D"]:
    """Writes each token's index key (one head, shared by all index queries) to its slot; -1 is skipped.

    Types of caches, and how keys are rounded to them: as `write_kv`.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    idx_k = check_index_rows(index_cache, idx_k, slots)
    return dispatch("write_index", _IMPLEMENTATIONS, impl, index_cache, idx_k, slots)


def check_index_rows(index_cache: Array, idx_k: Array, slots: Array) -> Float[Array, "T D"]:
    """What the writes of index keys ask of their operands; the keys as [T, D]."""
    checks.check_rank("index_cache", index_cache, "[P, B, D]")
    checks.check_cache("index_cache", index_cache)
    if idx_k.ndim == 3 and idx_k.shape[1] == 1:
        idx_k = idx_k[:, 0]
    checks.check_rank("idx_k", idx_k, "[T, D]")
    checks.check_rank("slots", slots, "[T]")
    checks.check_int("slots", slots)
    checks.check_extent("idx_k", "D", idx_k.shape[1], index_cache.shape[2], "in index_cache")
    checks.check_extent("slots", "T", slots.shape[0], idx_k.shape[0], "in idx_k")
    return idx_k
