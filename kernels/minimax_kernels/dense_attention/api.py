"""dense_attention: exact causal softmax attention over a paged cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels import checks
from minimax_kernels.batch import Batch
from minimax_kernels.dense_attention import pallas_triton, reference
from minimax_kernels.implementation import dispatch, implementations

_IMPLEMENTATIONS = implementations(pallas_triton.dense_attention, reference.dense_attention)


def dense_attention(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Array, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Array, "T Hq D"]:
    """Each token attends to all keys of its request at or before it.

    Args:
      q: queries, Hq / Hkv of them per KV head.
      k_cache, v_cache: pages of B tokens.
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
    if 0 in (q.shape[0], batch.num_requests, batch.num_blocks):  # no token, or none that sees a key
        return jnp.zeros_like(q) if out is None else out
    return dispatch("dense_attention", _IMPLEMENTATIONS, impl, q, k_cache, v_cache, batch, scale=scale, out=out)
