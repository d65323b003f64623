"""MXFP8 weights from the order of checkpoints to that of kernels and back, on the devices that hold their parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, UInt

from minimax_jax.tensor_table import MXFP8_BLOCK
from minimax_kernels import Mxfp8
from minimax_kernels.mxfp8 import interleave, straighten


def for_kernels(values: Float[Array, "*E N K"], scales: UInt[Array, "*E N K/32"]) -> Mxfp8:
    """A checkpoint's arrays as kernels read them.

    Each device's part gets the order of its own inputs. Blocks that hold a NaN get the scale 255 (NaN), as kernels look
    for it there alone: on the device, where looking at every byte costs next to nothing.
    """
    return Mxfp8(*_on_parts(_prepared, values.sharding, scales.sharding)(values, scales))


def values_in_rows(weight: Mxfp8) -> Any:
    """The values with inputs in their own order, as checkpoints have them; of JAX, where they lie, or of NumPy."""
    values: Any = weight.values
    return straighten(values) if isinstance(values, np.ndarray) else _on_parts(straighten, values.sharding)(values)


def marked_scales(codes: Any, scales: Any) -> Any:
    """The scales, 255 (NaN) for blocks that hold a NaN; of JAX or NumPy.

    Args:
      codes: [..., N, K] uint8, the values' bytes with inputs in their own order.
    """
    blocks = ((codes & 0x7F) == 0x7F).reshape(*scales.shape, MXFP8_BLOCK).any(axis=-1)
    return scales | (blocks.astype(scales.dtype) * scales.dtype.type(255))


def _prepared(values: Array, scales: Array) -> tuple[Array, Array]:
    return interleave(values), marked_scales(jax.lax.bitcast_convert_type(values, jnp.uint8), scales)


@functools.lru_cache(maxsize=64)
def _on_parts(fn: Callable[..., Any], *shardings: jax.sharding.Sharding) -> Callable[..., Any]:
    """`fn` of arrays that have these shardings, as its results have: each device works on what it holds."""
    named = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    if len(named) < len(shardings):
        return jax.jit(fn)
    specs = tuple(sharding.spec for sharding in named)
    results = specs if len(specs) > 1 else specs[0]
    return jax.jit(jax.shard_map(fn, mesh=named[0].mesh, in_specs=specs, out_specs=results, check_vma=False))
