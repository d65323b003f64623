"""Device side: queries of bfloat16 in the type in which products with e4m3 cost least.

The hardware turns e4m3 into float16 two numbers an instruction; into bfloat16 it takes three times as many. So
queries become float16, each row divided by a power of two that brings its largest element to 1 .. 4: what float16
then cannot hold is below 2 ** -24 of that element, a rounding error of the float32 sum.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels.cache_types import is_fp8

_EXPONENT = 0x7F800000  # float32's exponent field


def product_rows(
    q: Float[Array, "T D"], cache_dtype: DTypeLike
) -> tuple[Float[Array, "T D"], Float[Array, "T"] | None]:
    """(the rows as products with a cache take them, what each row's products are to be multiplied by; None for 1)."""
    if q.dtype != jnp.bfloat16 or not is_fp8(cache_dtype):
        return q, None
    wide = q.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=1)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(top, jnp.int32) & _EXPONENT, jnp.float32)
    factor = jnp.clip(power, 2.0**-126, 2.0**126)  # zeros, infinities and NaN are what they were
    return (wide * (1.0 / factor)[:, None]).astype(jnp.float16), factor
