"""Matrix products in plain jnp: quantised weights are dequantised first."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels.mxfp8 import Mxfp8, dequantize
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.weight_tiles import Weight


def matmul(
    x: Float[Array, "T K"], weights: Sequence[Weight], *, dtype: DTypeLike, activation: Swiglu | None = None
) -> tuple[Float[Array, "T N"], ...]:
    """See `minimax_kernels.matmul`."""

    def multiply(w: Weight) -> Array:
        matrix = dequantize(w, x.dtype) if isinstance(w, Mxfp8) else w
        # float32 operands are multiplied exactly: a GPU would round them to TF32 otherwise
        precision = jax.lax.Precision.HIGHEST if jnp.float32 in (x.dtype, matrix.dtype) else None
        return jnp.matmul(x, matrix, precision=precision, preferred_element_type=jnp.float32).astype(dtype)

    products = map(multiply, weights)
    return tuple(products if activation is None else map(activation.halves, products))
