"""The router in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.choose_experts import reference as choice
from minimax_kernels.matmul import reference as product


def route_tokens(
    x: Float[Array, "T H"], weight: Float[Array, "H E"], bias: Float[Array, "E"], *, num_chosen: int, scale: float
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """See `minimax_kernels.route_tokens`."""
    (logits,) = product.matmul(x.astype(jnp.float32), (weight,), dtype=jnp.dtype(jnp.float32))
    return choice.choose_experts(logits, bias, num_chosen=num_chosen, scale=scale)
