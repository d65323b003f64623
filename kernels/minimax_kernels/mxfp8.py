"""MXFP8 weights as a pytree: e4m3 values that share one e8m0 scale per 32 inputs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mxfp8:
    """A quantised matrix or stack of matrices (OCP Microscaling Formats 1.0, MXFP8 E4M3).

    Attributes:
      values: [..., K, N] float8_e4m3fn. Kernels take a NaN among them for 480: a block that holds one has scale 255.
      scales: [..., K / 32, N] uint8, exponent biased by 127: the factor is 2 ** (scale - 127).
    """

    values: Float[Array, "*E K N"]
    scales: UInt[Array, "*E K/32 N"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that this stands for."""
        return tuple(self.values.shape)

    def check(self, name: str) -> None:
        """Raises a ValueError that names `name` if types or shapes do not fit each other."""
        if self.values.dtype != jnp.float8_e4m3fn or self.scales.dtype != jnp.uint8:
            raise ValueError(
                f"{name} is Mxfp8 of {self.values.dtype} and {self.scales.dtype}: must be float8_e4m3fn and uint8"
            )
        *lead, rows, columns = self.shape
        if rows % BLOCK or self.scales.shape != (*lead, rows // BLOCK, columns):
            raise ValueError(
                f"{name} has scales {tuple(self.scales.shape)} for values {self.shape}: must be [..., K / 32, N]"
            )

    @property
    def ndim(self) -> int:
        """Rank of the matrix that this stands for."""
        return len(self.values.shape)


def dequantize(w: Mxfp8, dtype: DTypeLike = jnp.float32) -> Array:
    """values * 2 ** (scales - 127), by exponent arithmetic, so exact in float32; 255 gives NaN.

    Backends that flush float32 subnormals give zero for them, and for all of a block of scale 0.
    """
    bits = w.scales.astype(jnp.uint32) << 23  # the byte is float32's own exponent field
    subnormal = jnp.uint32(1 << 22)  # byte 0 is 2 ** -127, a float32 subnormal
    factor = jax.lax.bitcast_convert_type(jnp.where(w.scales == 0, subnormal, bits), jnp.float32)
    factor = jnp.where(w.scales == 255, jnp.nan, factor)
    return (w.values.astype(jnp.float32) * jnp.repeat(factor, BLOCK, axis=-2)).astype(dtype)
