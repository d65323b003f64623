"""Matrix products with whatever form a weight has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels.mxfp8 import Mxfp8, dequantize


def linear(x: Float[Array, "T K"], w: Float[Array, "K N"] | Mxfp8, dtype: DTypeLike | None = None) -> Array:
    """x @ w with float32 accumulation; the result has `dtype`, by default x's.

    float32 operands are multiplied exactly: a GPU would round them to TF32 otherwise.
    """
    matrix = dequantize(w, x.dtype) if isinstance(w, Mxfp8) else w
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = jnp.matmul(x, matrix, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(x.dtype if dtype is None else dtype)


def normal_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, std: float = 0.02) -> Array:
    """Fresh weights: normal with the initializer_range of the published configs."""
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
