"""Rotary position embedding on the first channels of each head (NeoX split halves)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RopeTables(NamedTuple):
    """Cosines and sines of the tokens' angles, float32, one column per rotated channel pair."""

    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]


def rope_tables(positions: Int[Array, "T"], theta: float, rotary_dim: int) -> RopeTables:
    """Angles position * theta ** (-2 i / rotary_dim) (`rope_theta`, `rotary_dim`), in float32.

    The frequencies are rounded on the host as torch rounds them (the power first, then its reciprocal): one unit
    in their last place, which XLA's folding changes, is 0.06 in the angle at a position of a million.
    """
    powers = np.power(float(theta), np.arange(0, rotary_dim, 2) / rotary_dim).astype(np.float32)
    angles = positions.astype(jnp.float32)[:, None] * (np.float32(1) / powers)
    return RopeTables(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: Float[Array, "T H D"], tables: RopeTables) -> Float[Array, "T H D"]:
    """Rotates channel i against channel i + rotary_dim / 2; channels past rotary_dim pass through."""
    half = tables.cos.shape[-1]
    cos, sin = tables.cos[:, None], tables.sin[:, None]
    low, high = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
