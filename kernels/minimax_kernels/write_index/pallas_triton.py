"""write_index: one launch."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels.write_pages import write_pages


def write_index(
    index_cache: Float[Array, "P B D"], idx_k: Float[Array, "T D"], slots: Int[Array, "T"], *, interpret: bool = False
) -> Float[Array, "P B D"]:
    """See `minimax_kernels.write_index`."""
    (written,) = write_pages((index_cache[:, None],), (idx_k[:, None],), slots, interpret=interpret)
    return written[:, 0]
