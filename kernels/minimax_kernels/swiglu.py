"""MiniMax-M3's gated activation, the same on the host side and in kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


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

    def of_tile(self, gate_up: Float[Array, "T 2n"]) -> Float[Array, "T n"]:
        """float32, inside a kernel, of `paired_columns`; halves are sums of one term, as tiles cannot be sliced."""
        parts = gate_up.reshape(gate_up.shape[0], 2, gate_up.shape[1] // 2)
        second = lax.broadcasted_iota(jnp.int32, parts.shape, 1) == 1
        zeros = jnp.zeros_like(parts)
        return self(jnp.where(second, zeros, parts).sum(axis=1), jnp.where(second, parts, zeros).sum(axis=1))


def paired_columns(first: jax.Array, count: int, width: int) -> Int[Array, "2n"]:
    """Inside a kernel: `count` columns of gate from `first` on, then the same of up, of [gate | up] `width` wide."""
    offset = jnp.arange(2 * count, dtype=jnp.int32)
    return first + offset + lax.div(offset, count) * (width // 2 - count)
