"""MXFP8 weights whose values hold NaN: on the device, where looking at every byte costs next to nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from minimax_jax.tensor_table import MXFP8_BLOCK
from minimax_kernels import Mxfp8


def marked_scales(weight: Mxfp8) -> UInt[Array, "*E K/32 N"]:
    """The weight's scales, 255 (NaN) for blocks that hold a NaN: kernels look for it there alone."""
    return jax.device_put(_marked(weight), weight.scales.sharding)


@jax.jit
def _marked(weight: Mxfp8) -> Array:
    codes = jax.lax.bitcast_convert_type(weight.values, jnp.uint8)
    *lead, inputs, outputs = codes.shape
    blocks = (codes & 0x7F == 0x7F).reshape(*lead, inputs // MXFP8_BLOCK, MXFP8_BLOCK, outputs)
    return jnp.where(blocks.any(axis=-2), jnp.uint8(255), weight.scales)
