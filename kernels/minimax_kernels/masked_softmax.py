"""Softmax attention of one tile of queries over gathered keys, with a mask: what both references share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minimax_kernels.cache_types import as_read


def masked_attention(
    q: Float[Array, "T H G D"],
    k: Float[Array, "H K D"],
    v: Float[Array, "H K D"],
    mask: Bool[Array, "H T K"],
    scale: float,
) -> Float[Array, "T H G D"]:
    """Attention of G query heads per key head in float32; a row with nothing visible gives zeros.

    Values that no row may see are set to zero before the product, so that NaN in them reaches nothing.
    """
    exact = jax.lax.Precision.HIGHEST
    keys = as_read(k, q.dtype)
    scores = jnp.einsum("thgd,hkd->hgtk", q, keys, precision=exact, preferred_element_type=jnp.float32) * scale
    visible = mask[:, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.where(visible, jnp.exp(scores - jax.lax.stop_gradient(top)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    v = jnp.where(mask.any(axis=1)[..., None], v.astype(jnp.float32), 0)
    return jnp.einsum("hgtk,hkd->thgd", weights, v, precision=exact, preferred_element_type=jnp.float32)
