"""The types that caches hold: those of the activations, or e4m3 in a half or a quarter of their bytes.

e4m3 (1 sign, 4 exponent, 3 mantissa bits; OCP 8-bit floating point, E4M3) stands for the number itself: no scale is
kept beside it. M3's checkpoints have none, and its keys need none: after QK norm and RoPE each channel is at most
sqrt(D) * (1 + w), about 11 where w is 0. Values are not bounded that way; what lies beyond 448 is stored as 448, and
NaN stays NaN. All of e4m3's numbers are numbers of bfloat16 and float16 too, so reading is exact.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

FP8 = "float8_e4m3fn"
FP8_MAX = 448.0


def is_fp8(dtype: DTypeLike) -> bool:
    """Whether a type is e4m3."""
    return jnp.dtype(dtype).name == FP8


def as_stored(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Rows in the type of a cache: rounded to nearest even, and for e4m3 cut off at 448, which a cast alone is not."""
    if not is_fp8(dtype):
        return x.astype(dtype)
    wide = x.astype(jnp.float32)
    # comparisons let NaN through, which minimum and maximum may not
    wide = jnp.where(wide > FP8_MAX, FP8_MAX, jnp.where(wide < -FP8_MAX, -FP8_MAX, wide))
    return wide.astype(dtype)


def as_read(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """What a cache holds, to be multiplied with queries of `dtype`: e4m3 in their type, exactly, all else as it is."""
    return x.astype(dtype) if is_fp8(x.dtype) else x
