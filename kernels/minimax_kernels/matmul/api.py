"""matmul: rows times one weight, or several at once, in whatever form the weights are."""

from __future__ import annotations

from typing import Any, overload

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.matmul import pallas_triton, reference
from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.weight_tiles import Weight

_IMPLEMENTATIONS = implementations(pallas_triton.matmul, reference.matmul)


@overload
def matmul(
    x: Float[Array, "T K"],
    w: Weight,
    *,
    dtype: DTypeLike | None = None,
    activation: Swiglu | None = None,
    impl: str | None = None,
) -> Float[Array, "T N"]: ...


@overload
def matmul(
    x: Float[Array, "T K"], w: tuple[Weight, ...], *, dtype: DTypeLike | None = None, impl: str | None = None
) -> tuple[Float[Array, "T N"], ...]: ...


def matmul(
    x: Float[Array, "T K"],
    w: Weight | tuple[Weight, ...],
    *,
    dtype: DTypeLike | None = None,
    activation: Swiglu | None = None,
    impl: str | None = None,
) -> Float[Array, "T N"] | tuple[Float[Array, "T N"], ...]:
    """x @ w, accumulated in float32; the results have `dtype`, by default x's.

    An `Mxfp8` weight counts as its values times its scales, rounded to x's type. `pallas_triton` reads its 8 bits and
    dequantises in registers, or with thousands of rows about half of the columns at a time. Several weights that
    share x are one launch; of arrays those with few rows, all others are left to XLA.

    Args:
      w: [K, N], or a tuple of such with one K; then the results are a tuple.
      activation: for one weight [K, 2 * N] of [gate | up], joins the halves of the product as `dtype` has it; the
        result is [T, N].

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    weights = w if isinstance(w, tuple) else (w,)
    checks.check_rank("x", x, "[T, K]")
    checks.check_float("x", x)
    if not weights:
        raise ValueError("w = (): must be a weight or at least one of them")
    for i, weight in enumerate(weights):
        name = f"w[{i}]" if isinstance(w, tuple) else "w"
        check_weight(name, weight, "[K, N]")
        checks.check_extent("x", "K", x.shape[1], weight.shape[0], f"in {name}")
    if activation is not None:
        if isinstance(w, tuple):
            raise ValueError("activation: must be None where w is a tuple, as it joins the halves of one weight")
        checks.check_multiple("w's last axis", w.shape[1], "the number of halves", 2)
    options: dict[str, Any] = {"activation": activation, "dtype": jnp.dtype(x.dtype if dtype is None else dtype)}
    if impl is None and pallas_triton.left_to_xla(x, weights):
        results = reference.matmul(x, weights, **options)
    else:
        results = dispatch("matmul", _IMPLEMENTATIONS, impl, x, weights, differentiable=True, **options)
    return results if isinstance(w, tuple) else results[0]


def check_weight(name: str, w: Weight, shape: str) -> None:
    """Rank and types of a weight; of MXFP8 also that its scales fit its values."""
    checks.check_rank(name, w.values if isinstance(w, Mxfp8) else w, shape)
    if isinstance(w, Mxfp8):
        w.check(name)
    else:
        checks.check_float(name, w)
