"""Projections, norms and rotary embedding in plain jnp."""

from __future__ import annotations

from jaxtyping import Array, Float

from minimax_kernels.matmul import reference as matmul_reference
from minimax_kernels.norm_rope import reference as norm_rope_reference
from minimax_kernels.project_norm_rope.composed import composed
from minimax_kernels.weight_tiles import Weight


def project_norm_rope(
    x: Float[Array, "T K"],
    weights: tuple[Weight, ...],
    norms: tuple[Float[Array, "D"] | None, ...],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
    detached: int = 0,
) -> tuple[Float[Array, "T H D"], ...]:
    """See `minimax_kernels.project_norm_rope`."""

    def matmul(x: Array, weights: tuple[Weight, ...]) -> tuple[Array, ...]:
        return matmul_reference.matmul(x, weights, dtype=x.dtype)

    return composed(matmul, norm_rope_reference.norm_rope, x, weights, norms, cos, sin, eps=eps, detached=detached)
