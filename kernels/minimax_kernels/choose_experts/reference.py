"""The router's choice in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def choose_experts(
    logits: Float[Array, "T E"], bias: Float[Array, "E"], *, num_chosen: int, scale: float
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """See `minimax_kernels.choose_experts`."""
    scores = jax.nn.sigmoid(logits)
    _, expert_ids = jax.lax.top_k(scores + bias, num_chosen)
    chosen = jnp.take_along_axis(scores, expert_ids, axis=-1)
    weights = chosen / chosen.sum(axis=-1, keepdims=True) * scale
    # top_k passes over a NaN on some devices
    return expert_ids, jnp.where(jnp.isnan(scores).any(axis=-1, keepdims=True), jnp.nan, weights)
