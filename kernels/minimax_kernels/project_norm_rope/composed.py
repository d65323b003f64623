"""The operation as a product, and norms and rotations of its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.weight_tiles import Weight


def composed(
    matmul: Callable[..., tuple[Array, ...]],
    norm_rope: Callable[..., tuple[Array, ...]],
    x: Float[Array, "T K"],
    weights: tuple[Weight, ...],
    norms: tuple[Float[Array, "D"] | None, ...],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
    detached: int,
) -> tuple[Float[Array, "T H D"], ...]:
    """`minimax_kernels.project_norm_rope` by `matmul(x, weights)` and `norm_rope(xs, norms, cos, sin, eps=)`."""
    products = _products(matmul, x, weights, len(weights) - detached)
    return turn_normed(
        lambda heads, weights: norm_rope(heads, weights, cos, sin, eps=eps), split_heads(products, norms), norms
    )


def turn_normed(
    turn: Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[Array, ...]],
    heads: Sequence[Float[Array, "T H D"]],
    norms: tuple[Float[Array, "D"] | None, ...],
) -> tuple[Float[Array, "T H D"], ...]:
    """`turn(heads, norms)` of those that have a norm, in their places among the others."""
    normed = [(own, norm) for own, norm in zip(heads, norms, strict=True) if norm is not None]
    turned = iter(turn(tuple(own for own, _ in normed), tuple(norm for _, norm in normed)))
    return tuple(own if norm is None else next(turned) for own, norm in zip(heads, norms, strict=True))


def _products(matmul: Callable[..., Any], x: Array, weights: tuple[Weight, ...], attached: int) -> tuple[Array, ...]:
    """The first `attached` with derivatives by x."""
    if attached == len(weights):
        return matmul(x, weights)
    if any(isinstance(weight, Mxfp8) for weight in weights):  # nothing is trained in 8 bits: one product for all
        products = matmul(x, weights)
        return products[:attached] + jax.lax.stop_gradient(products[attached:])
    first = matmul(x, weights[:attached]) if attached else ()
    return first + matmul(jax.lax.stop_gradient(x), weights[attached:])


def split_heads(
    products: tuple[Float[Array, "*S T N"], ...], norms: tuple[Float[Array, "D"] | None, ...]
) -> list[Float[Array, "*S T H D"]]:
    """Each product's columns as heads of as many channels as its norm has; without one, as the first norm."""
    first = norms[0]
    assert first is not None
    channels = [(first if norm is None else norm).shape[0] for norm in norms]
    return [
        product.reshape(*product.shape[:-1], product.shape[-1] // size, size)
        for product, size in zip(products, channels, strict=True)
    ]
