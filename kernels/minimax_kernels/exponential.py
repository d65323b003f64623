"""The exponential of the kernels' softmax."""

from __future__ import annotations

import struct

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

LOG2_E = 1.4426950408889634


def exp2_scaled(
    x: Float[Array, "T K"], scale: float | Float[Array, "T"], shift: Float[Array, "T"], *, interpret: bool
) -> Float[Array, "T K"]:
    """2 ** (x * scale - shift), shift one number a row, scale one for all or one a row: [T, K] float32.

    On a GPU a fused multiply-add and one exponential (2 units in the last place; results below 2 ** -126 are zero).
    XLA would keep multiplication and subtraction apart, and `jnp.exp2` add three instructions for tiny results.
    """
    if interpret:
        return jnp.exp2(x * (scale if isinstance(scale, float) else scale[:, None]) - shift[:, None])
    minus = jnp.broadcast_to(-shift[:, None], x.shape)
    if not isinstance(scale, float):
        (result,) = plgpu.elementwise_inline_asm(
            "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
            args=[x, jnp.broadcast_to(scale[:, None], x.shape), minus],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        )
        return result
    (factor,) = struct.unpack(">I", struct.pack(">f", scale))
    (result,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.f32 t, $1, 0f{factor:08X}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, minus],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result
