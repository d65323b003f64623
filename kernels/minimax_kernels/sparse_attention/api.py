"""sparse_attention: exact softmax attention over the selected blocks of a paged cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.batch import Batch
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.sparse_attention import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.sparse_attention, reference.sparse_attention)


def sparse_attention(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    selected: Int[Array, "Hkv T topk"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Array, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Array, "T Hq D"]:
    """Each token attends to the keys at or before it inside the blocks selected for its KV head.

    Args:
      q: queries, Hq / Hkv of them per KV head.
      k_cache, v_cache: pages of B tokens.
      selected: logical block ids, unique per row, -1 for none. A multiple of Hkv selections is also taken
        (a KV group then splits into that many parts with a selection each).
      batch: whose padding rows are not written.
      scale: of q.k before the softmax, usually D ** -0.5; a positive number.
      out: buffer for the result, of q's shape and any float type; rows without a token keep what they hold.

    Returns:
      The attended values, accumulated in float32; zeros in padding rows when `out` is None.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_attention(q, k_cache, v_cache, batch, out)
    scale = checks.check_scale(scale)
    checks.check_rank("selected", selected, "[Hkv, T, topk]")
    checks.check_int("selected", selected)
    checks.check_extent("selected", "T", selected.shape[1], q.shape[0], "in q")
    checks.check_positive("selected's topk", selected.shape[2])
    checks.check_multiple("selected's Hkv", selected.shape[0], "k_cache's Hkv", k_cache.shape[1])
    checks.check_multiple("q's Hq", q.shape[1], "selected's Hkv", selected.shape[0])
    if 0 in (q.shape[0], batch.num_requests, batch.num_blocks):  # no token, or none that sees a key
        return jnp.zeros_like(q) if out is None else out
    return dispatch(
        "sparse_attention", _IMPLEMENTATIONS, impl, q, k_cache, v_cache, selected, batch, scale=scale, out=out
    )
