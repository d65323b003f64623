"""Device side: tiles of MXFP8 weights become bfloat16 in registers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from minimax_kernels.mxfp8 import BLOCK
from minimax_kernels.register_order import register_order


def expand_ptx(data: str, pairs: tuple[str, str], factors: tuple[str, str]) -> str:
    """PTX that turns four e4m3 bytes into two pairs of bfloat16, times a pair of factors each; names of registers.

    A byte seeeemmm becomes s 0000eeee mmm0000, the value times 2 ** -120, subnormals included, and multiplying by
    2 ** 120 (0x7b80) is exact. The hardware's own conversion goes through float16 and float32. `EXPAND_REGISTERS`
    declares what this uses.
    """
    return f"""prmt.b32 low, {data}, 0, 0x1404;
prmt.b32 high, {data}, 0, 0x3424;
shr.b32 bits, low, 4;
and.b32 bits, bits, 0x07f007f0;
lop3.b32 low, low, 0x80008000, bits, 0xEA;
shr.b32 bits, high, 4;
and.b32 bits, bits, 0x07f007f0;
lop3.b32 high, high, 0x80008000, bits, 0xEA;
mul.rn.bf16x2 low, low, bias;
mul.rn.bf16x2 high, high, bias;
mul.rn.bf16x2 {pairs[0]}, low, {factors[0]};
mul.rn.bf16x2 {pairs[1]}, high, {factors[1]};
"""


EXPAND_REGISTERS = ".reg .b32 low, high, bits, bias;\nmov.b32 bias, 0x7b807b80;\n"
_EXPAND = "{\n" + EXPAND_REGISTERS + expand_ptx("$2", ("$0", "$1"), ("$3", "$4")) + "}"


def scale_factors(scales: jax.Array) -> jax.Array:
    """bfloat16 of e8m0 bytes: 2 ** (byte - 127); 255 is NaN."""
    bits = scales.astype(jnp.uint16) << 7  # the byte is bfloat16's own exponent field
    bits = jnp.where(scales == 0, jnp.uint16(0x0040), bits)  # 2 ** -127 is subnormal
    bits = jnp.where(scales == 255, jnp.uint16(0x7FC0), bits)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def dequantize_tile(values: jax.Array, scales: jax.Array, *, interleaved: int, interpret: bool) -> jax.Array:
    """bfloat16 [N, K] of values [N, K] and scales [N, K / 32] uint8, rounded once where bfloat16 has no such number.

    A value that is NaN gives +-480 times its scale: blocks that hold one have scale 255 (`Mxfp8`). The order of inputs
    becomes their own at no cost: it is that of the registers which the matrix instructions read.

    Args:
      interleaved: `interleaved_inputs` of the whole matrix; divides K.
    """
    columns, rows = values.shape
    assert rows % interleaved == 0, (rows, interleaved)
    factors = scale_factors(scales)
    factors = jnp.broadcast_to(factors[:, :, None], (columns, rows // BLOCK, BLOCK)).reshape(columns, rows)
    data = register_order(lax.bitcast_convert_type(values, jnp.uint8), interleaved)
    if interpret:
        return expand_bytes(data) * factors
    (result,) = plgpu.elementwise_inline_asm(
        _EXPAND,
        args=[data, factors],
        constraints="=r,=r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, jnp.bfloat16)],
    )
    return result


def expand_bytes(data: jax.Array) -> jax.Array:
    """The assembly's steps but for the factors, an element at a time, for interpreters: bfloat16 of uint8."""
    bits = data.astype(jnp.uint16) << 8
    bits = ((bits >> 4) & 0x07F0) | (bits & 0x8000)
    value = lax.bitcast_convert_type(bits, jnp.bfloat16) * jnp.bfloat16(2.0**120)
    # a GPU multiplies subnormals, a CPU that takes them for zeros does not
    tiny = (data & 7).astype(jnp.bfloat16) * jnp.where(data >= 128, -(2.0**-9), 2.0**-9).astype(jnp.bfloat16)
    return jnp.where((data & 0x78) == 0, tiny, value)
