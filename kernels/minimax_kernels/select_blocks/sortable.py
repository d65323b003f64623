"""Scores as integers in their order, so that ties, NaN and forced blocks are plain comparisons."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOWEST = -(2**31)  # key of what cannot be chosen
FORCED = 0x7F800000  # key of +inf: above every number, below NaN
HIDDEN = -0x7F800001  # key of -inf: below every number
NAN = 0x7FFFFFFF


def is_forced(block: Int[Array, "..."], own: Int[Array, ""], init_blocks: int, local_blocks: int) -> Bool[Array, "..."]:
    """Which visible blocks are taken whatever their scores: the first ones, and the last up to the token's own."""
    is_local = block > own - local_blocks
    return is_local | (block < init_blocks) if init_blocks else is_local


def choice_keys(
    scores: Float[Array, "..."],
    visible: Bool[Array, "..."],
    block: Int[Array, "..."],
    own: Int[Array, ""],
    init_blocks: int,
    local_blocks: int,
) -> Int[Array, "..."]:
    """Keys that forced blocks have above all numbers, and blocks that are not visible below."""
    forced = visible & is_forced(block, own, init_blocks, local_blocks)
    return jnp.where(forced, FORCED, jnp.where(visible, sortable(scores), LOWEST))


def sortable(scores: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of float32 scores: -0.0 equals 0.0, NaN is above everything."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    ordered = bits ^ (lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF)
    return jnp.where(scores != scores, NAN, ordered)
