"""MXFP8 weights whose values hold NaN: on the device, where looking at every byte costs next to nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from minimax_jax.tensor_table import MXFP8_BLOCK
from minimax_kernels import Mxfp8


def marked_scales(weight: Mxfp8) -> UInt[Array, "*E N K/32"]:
    """The weight's scales, 255 (NaN) for blocks that hold a NaN: kernels look for it there alone."""
    return jax.device_put(_marked(weight), weight.scales.sharding)


@jax.jit
def _marked(weight: Mxfp8) -> Array:
    codes = jax.lax.bitcast_convert_type(weight.values, jnp.uint8)
    blocks = (codes & 0x7F == 0x7F).reshape(*weight.scales.shape, MXFP8_BLOCK)
    return jnp.where(blocks.any(axis=-1), jnp.uint8(255), weight.scales)
