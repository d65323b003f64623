"""Gemma-style RMS normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels import add_norm, rms_norm


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + weight) over the last axis, in float32 (`use_gemma_norm`, `rms_norm_eps`)."""

    def __init__(self, size: int, eps: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.weight[...], self.eps)

    def of_sum(
        self, x: Float[Array, "T H"], update: Float[Array, "T H"]
    ) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
        """(x + update, its norm)."""
        return add_norm(x, update, self.weight[...], eps=self.eps)
