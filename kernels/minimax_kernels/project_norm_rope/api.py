"""project_norm_rope: from a layer's rows to the heads of its queries, keys and values."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.matmul.api import check_weight, matmul
from minimax_kernels.norm_rope.api import norm_rope
from minimax_kernels.project_norm_rope import pallas_triton, reference
from minimax_kernels.project_norm_rope.composed import composed
from minimax_kernels.weight_tiles import Weight

_IMPLEMENTATIONS = implementations(pallas_triton.project_norm_rope, reference.project_norm_rope)


def project_norm_rope(
    x: Float[Array, "T K"],
    weights: tuple[Weight, ...],
    norms: tuple[Float[Array, "D"] | None, ...],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
    detached: int = 0,
    impl: str | None = None,
) -> tuple[Float[Array, "T H D"], ...]:
    """`matmul` of x with several weights, whose results `norm_rope` normalises and turns head by head.

    Each product is rounded to x's type before its norm. With few rows `pallas_triton` is two launches: the product,
    and one that also adds up its splits, in float32 and in their order. Results are those of the two operations: bit
    for bit where there is no norm, up to the order of the mean square's sum elsewhere.

    Args:
      weights: [K, H * D] each, of queries, keys and values, and the index branch's queries and keys, or of some of
        them; H and D may differ.
      norms: one for each of `weights`. None is a product that is not normalised and not turned, such as the values;
        its heads have the channels of `norms[0]`, which is not None.
      cos, sin: of the tokens' angles, float32.
      eps: added to the mean square (`rms_norm_eps`).
      detached: so many of the last products count as constants where derivatives by x are taken.

    Returns:
      One array for each of `weights`, of x's type.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    _check(x, weights, norms, cos, sin, detached)
    options: dict[str, Any] = {"eps": eps, "detached": detached}
    if impl is None and not pallas_triton.in_two_launches(x, weights, norms):
        return composed(matmul, norm_rope, x, weights, norms, cos, sin, **options)
    return dispatch(
        "project_norm_rope", _IMPLEMENTATIONS, impl, x, weights, norms, cos, sin, differentiable=True, **options
    )


def _check(x: Array, weights: tuple, norms: tuple, cos: Array, sin: Array, detached: int) -> None:
    checks.check_rank("x", x, "[T, K]")
    checks.check_float("x", x)
    if not weights or len(norms) != len(weights):
        raise ValueError(f"norms: {len(norms)} of them, must be {len(weights)}, one for each of weights, at least one")
    if norms[0] is None:
        raise ValueError("norms[0] = None: must be [D], whose D the products without a norm have too")
    if not 0 <= detached <= len(weights):
        raise ValueError(f"detached = {detached}: must be within 0..{len(weights)}, the number of weights")
    checks.check_rank("cos", cos, "[T, half]")
    checks.check_extent("cos", "T", cos.shape[0], x.shape[0], "in x")
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}: must be {tuple(cos.shape)}, as cos")
    for i, (weight, norm) in enumerate(zip(weights, norms, strict=True)):
        name = f"weights[{i}]"
        check_weight(name, weight, "[K, N]")
        checks.check_extent("x", "K", x.shape[1], weight.shape[0], f"in {name}")
        if norm is not None:
            checks.check_rank(f"norms[{i}]", norm, "[D]")
            if not 1 <= cos.shape[1] <= norm.shape[0] // 2:
                raise ValueError(
                    f"cos has half = {cos.shape[1]}: must be within 1..{norm.shape[0] // 2}, which is half of "
                    f"norms[{i}]'s D"
                )
        of = norms[0] if norm is None else norm
        checks.check_multiple(f"{name}'s N", weight.shape[1], f"norms[{0 if norm is None else i}]'s D", of.shape[0])
