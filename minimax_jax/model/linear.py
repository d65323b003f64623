"""Matrix products with whatever form a weight has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels import Mxfp8, Swiglu, matmul

FEW_ROWS = 256  # up to which a float32 product is bound by reading its weight


def linear(
    x: Float[Array, "T K"],
    w: Float[Array, "K N"] | Mxfp8,
    dtype: DTypeLike | None = None,
    *,
    activation: Swiglu | None = None,
) -> Array:
    """x @ w with float32 accumulation; the result has `dtype`, by default x's. `activation` joins [gate | up].

    float32 operands are multiplied exactly: a GPU would round them to TF32 otherwise.
    """
    return matmul(x, w, dtype=dtype, activation=activation)


def linear_float32(x: Float[Array, "T K"], w: Float[Array, "K N"]) -> Float[Array, "T N"]:
    """x @ w for a float32 weight, as accurate as a float32 product.

    Many bfloat16 rows meet the weight as a sum of three bfloat16 parts, which holds all of its 24 bits: each product is
    exact, they add up in float32, and matrix units do it several times as fast as float32 arithmetic.
    """
    if x.dtype != jnp.bfloat16 or x.shape[0] <= FEW_ROWS:
        return matmul(x.astype(jnp.float32), w)
    return _product_in_parts(x, w)


@jax.custom_jvp
def _product_in_parts(x: Float[Array, "T K"], w: Float[Array, "K N"]) -> Float[Array, "T N"]:
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(w, 8, 7)  # a cast to and fro may be optimised away
        parts.append(part.astype(jnp.bfloat16))
        w = w - part
    # the barrier keeps XLA from joining this product with others of the same rows, whose results would be float32 too
    products = matmul(jax.lax.optimization_barrier(x), jnp.concatenate(parts, axis=1), dtype=jnp.float32)
    high, middle, low = jnp.split(products, 3, axis=1)
    return high + (middle + low)


@_product_in_parts.defjvp
def _derivative(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """That of the product itself: through the parts it would be rounded to bfloat16."""
    (x, w), (dx, dw) = primals, tangents
    return _product_in_parts(x, w), matmul(dx.astype(jnp.float32), w) + matmul(x.astype(jnp.float32), dw)


def normal_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, std: float = 0.02) -> Array:
    """Fresh weights: normal with the initializer_range of the published configs."""
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
