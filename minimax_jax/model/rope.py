"""Angles of the rotary position embedding; `minimax_kernels.norm_rope` turns heads by them."""

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
