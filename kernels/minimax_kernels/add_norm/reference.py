"""Residual addition and RMS normalisation in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) * (1 + weight) over the last axis, in float32; Gemma style: the weight is zero at first."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)


def add_norm(
    x: Float[Array, "T H"], update: Float[Array, "T H"], weight: Float[Array, "H"], *, eps: float
) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
    """See `minimax_kernels.add_norm`."""
    total = x + update
    return total, rms_norm(total, weight, eps)
