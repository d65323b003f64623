"""norm_rope: the norm of each head and the rotation that follows, for queries and keys of one layer together."""

from __future__ import annotations

from jaxtyping import Array, Float

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.norm_rope import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.norm_rope, reference.norm_rope)


def norm_rope(
    xs: tuple[Float[Array, "T H D"], ...],
    weights: tuple[Float[Array, "D"], ...],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
    impl: str | None = None,
) -> tuple[Float[Array, "T H D"], ...]:
    """Each head's RMS norm times 1 + weight (Gemma style), then the rotary embedding of its first channels, in float32.

    Channel i turns against channel i + half (NeoX split halves); channels from 2 * half on pass through. The norm is
    rounded to x's type before the rotation, and so is the result.

    Args:
      xs: the heads of queries, keys, index queries and index keys, or of some of them; H and D may differ.
      weights: one for each of `xs`.
      cos, sin: of the tokens' angles, float32.
      eps: added to the mean square (`rms_norm_eps`).

    Returns:
      One array for each of `xs`, of its shape and type.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    if not xs or len(weights) != len(xs):
        raise ValueError(f"weights: {len(weights)} of them, must be {len(xs)}, one for each of xs, and at least one")
    checks.check_rank("cos", cos, "[T, half]")
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}: must be {tuple(cos.shape)}, as cos")
    for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        checks.check_rank(f"xs[{i}]", x, "[T, H, D]")
        checks.check_float(f"xs[{i}]", x)
        checks.check_extent(f"xs[{i}]", "T", x.shape[0], cos.shape[0], "in cos")
        checks.check_rank(f"weights[{i}]", weight, "[D]")
        checks.check_extent(f"weights[{i}]", "D", weight.shape[0], x.shape[2], f"in xs[{i}]")
        if not 1 <= cos.shape[1] <= x.shape[2] // 2:
            raise ValueError(
                f"cos has half = {cos.shape[1]}: must be within 1..{x.shape[2] // 2}, which is half of xs[{i}]'s D"
            )
    return dispatch("norm_rope", _IMPLEMENTATIONS, impl, xs, weights, cos, sin, differentiable=True, eps=eps)
