"""Norm and rotary embedding of heads in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels.add_norm.reference import rms_norm


def norm_rope(
    xs: tuple[Float[Array, "T H D"], ...],
    weights: tuple[Float[Array, "D"], ...],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
) -> tuple[Float[Array, "T H D"], ...]:
    """See `minimax_kernels.norm_rope`."""
    return tuple(rotate(rms_norm(x, weight, eps), cos, sin) for x, weight in zip(xs, weights, strict=True))


def rotate(x: Float[Array, "T H D"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]) -> Array:
    """Channel i turned against channel i + half, in float32; channels from 2 * half on pass through."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    low, high = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
