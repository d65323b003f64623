"""Scores as integers in their order, so that ties, NaN and forced blocks are plain comparisons."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

LOWEST = -(2**31)  # key of what cannot be chosen
FORCED = 0x7F800000  # key of +inf: above every number, below NaN
HIDDEN = -0x7F800001  # key of -inf: below every number
NAN = 0x7FFFFFFF


def sortable(scores: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of float32 scores: -0.0 equals 0.0, NaN is above everything."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    ordered = bits ^ (lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF)
    return jnp.where(scores != scores, NAN, ordered)
