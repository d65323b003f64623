"""MiniMax-M3's gated activation, the same on the host side and in kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Swiglu:
    """(up + beta) * gate * sigmoid(alpha * gate), gate clamped above and up on both sides.

    Attributes:
      alpha, beta, limit: the config's `swiglu_alpha`, `swiglu_beta`, `swiglu_limit`.
    """

    alpha: float
    beta: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """float32 of two arrays of one shape and any type."""
        gate = jnp.minimum(gate.astype(jnp.float32), self.limit)
        up = jnp.clip(up.astype(jnp.float32), -self.limit, self.limit)
        return (up + self.beta) * gate * jax.nn.sigmoid(self.alpha * gate)

    def halves(self, gate_up: Float[Array, "T 2F"]) -> Float[Array, "T F"]:
        """Of [gate | up], in its type."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return self(gate, up).astype(gate_up.dtype)
