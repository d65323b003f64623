"""MXFP8 weights as a pytree: e4m3 values that share one e8m0 scale per 32 inputs.

The arrays have their outputs first, as checkpoints do. The inputs of one column of the matrix are then next to each
other, as the matrix instructions want those of an operand that comes from registers, where bytes become bfloat16. They
are so in the order of `interleave`: of each 64 inputs a thread holds 16, for four instructions, and reads them at once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt

from minimax_kernels.register_order import AnyArray, memory_order, register_order

BLOCK = 32
INTERLEAVED = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mxfp8:
    """A quantised matrix or stack of matrices (OCP Microscaling Formats 1.0, MXFP8 E4M3).

    Attributes:
      values: [..., N, K] float8_e4m3fn, inputs in the order of `interleave`; of an array that is split over devices,
        each device's part is so by itself. Kernels take a NaN among them for 480: a block that holds one has scale 255.
      scales: [..., N, K / 32] uint8, exponent biased by 127: the factor is 2 ** (scale - 127).
    """

    values: Float[Array, "*E N K"]
    scales: UInt[Array, "*E N K/32"]

    @classmethod
    def from_rows(cls, values: AnyArray, scales: AnyArray) -> Mxfp8:
        """Of values whose inputs are in their own order, as checkpoints have them."""
        return cls(interleave(values), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, N], the shape of the matrix that this stands for."""
        *lead, columns, rows = self.values.shape
        return (*lead, rows, columns)

    def check(self, name: str) -> None:
        """Raises a ValueError that names `name` if types or shapes do not fit each other."""
        if self.values.dtype != jnp.float8_e4m3fn or self.scales.dtype != jnp.uint8:
            raise ValueError(
                f"{name} is Mxfp8 of {self.values.dtype} and {self.scales.dtype}: must be float8_e4m3fn and uint8"
            )
        if self.values.shape[-1] % BLOCK or not self.scales_fit:
            raise ValueError(
                f"{name} has scales {tuple(self.scales.shape)} for values {tuple(self.values.shape)}: must be "
                f"[..., N, K / {BLOCK}] for [..., N, K]"
            )

    @property
    def scales_fit(self) -> bool:
        """Whether there is a scale for every whole block of inputs."""
        *columns, rows = self.values.shape
        return self.scales.shape == (*columns, rows // BLOCK)

    @property
    def ndim(self) -> int:
        """Rank of the matrix that this stands for."""
        return len(self.values.shape)


def interleave(values: AnyArray) -> AnyArray:
    """[..., K] in the order in which kernels read inputs, of JAX or NumPy.

    In each 64 (32 if K is no multiple of 64) input 8 c + 2 t + j comes to lie at t (64 / 4) + 2 c + j: thread t of the
    four that share a column holds inputs 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of every 16 (PTX ISA, register fragments of
    wgmma.mma_async.m64nNk16, matrix A).
    """
    return memory_order(values, interleaved_inputs(values.shape[-1]))


def straighten(values: AnyArray) -> AnyArray:
    """The inverse of `interleave`."""
    return register_order(values, interleaved_inputs(values.shape[-1]))


def interleaved_inputs(in_features: int) -> int:
    """How many inputs are in an order of their own, block after block: what a kernel's steps must be multiples of."""
    return INTERLEAVED if in_features % INTERLEAVED == 0 else BLOCK


def dequantize(w: Mxfp8, dtype: DTypeLike = jnp.float32) -> Float[Array, "*E K N"]:
    """The matrix; see `dequantize_columns`."""
    return dequantize_columns(w, dtype).swapaxes(-1, -2)


def dequantize_columns(w: Mxfp8, dtype: DTypeLike = jnp.float32) -> Float[Array, "*E N K"]:
    """The matrix's transpose: values * 2 ** (scales - 127), by exponent arithmetic, so exact in float32; 255 gives NaN.

    Backends that flush float32 subnormals give zero for them, and for all of a block of scale 0.
    """
    bits = w.scales.astype(jnp.uint32) << 23  # the byte is float32's own exponent field
    subnormal = jnp.uint32(1 << 22)  # byte 0 is 2 ** -127, a float32 subnormal
    factor = jax.lax.bitcast_convert_type(jnp.where(w.scales == 0, subnormal, bits), jnp.float32)
    factor = jnp.where(w.scales == 255, jnp.nan, factor)
    return (straighten(w.values).astype(jnp.float32) * jnp.repeat(factor, BLOCK, axis=-1)).astype(dtype)
