"""add_norm: what a layer adds to its residual, and the norm that follows."""

from __future__ import annotations

from jaxtyping import Array, Float

from minimax_kernels import checks
from minimax_kernels.add_norm import pallas_triton, reference
from minimax_kernels.implementation import dispatch, implementations

_IMPLEMENTATIONS = implementations(pallas_triton.add_norm, reference.add_norm)


def add_norm(
    x: Float[Array, "T H"],
    update: Float[Array, "T H"],
    weight: Float[Array, "H"],
    *,
    eps: float,
    impl: str | None = None,
) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
    """(x + update, its RMS norm times 1 + weight): Gemma style, the norm in float32, both rounded to x's type.

    Args:
      eps: added to the mean square (`rms_norm_eps`).

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_rank("x", x, "[T, H]")
    checks.check_float("x", x)
    if update.shape != x.shape or update.dtype != x.dtype:
        raise ValueError(
            f"update is {update.dtype} of shape {tuple(update.shape)}: must be {x.dtype} of {tuple(x.shape)}, as x"
        )
    checks.check_rank("weight", weight, "[H]")
    checks.check_extent("weight", "H", weight.shape[0], x.shape[1], "in x")
    return dispatch("add_norm", _IMPLEMENTATIONS, impl, x, update, weight, differentiable=True, eps=eps)
