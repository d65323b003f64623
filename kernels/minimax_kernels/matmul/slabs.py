"""Very many rows times an MXFP8 weight, half of its columns at a time.

With thousands of rows the conversion inside the product, which every tile of rows repeats, costs more than half of the
matrix units' time: shared memory carries the bytes, the bfloat16 values and the operands. Here XLA converts half of
the columns once, and the product reads bfloat16. The halves use the same memory one after the other, so that at no
time all of a quantised weight exists in floats.
"""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels.matmul_launches import MatmulLaunch, largest_divisor
from minimax_kernels.mxfp8 import Mxfp8, dequantize_columns
from minimax_kernels.triton_call import Launch, ceil_div, triton_call
from minimax_kernels.weight_tiles import Weight, WeightTiles, multiply_tile, store_rows

SLABS = 2
SLAB_ROWS = 2048  # from which they pay
SLAB_COLUMNS = 512  # of a weight; fewer are not worth three launches more


def takes_slabs(weight: Weight, num_rows: int) -> TypeGuard[Mxfp8]:
    """Whether `multiply_by_slabs` is the faster way."""
    if not isinstance(weight, Mxfp8) or num_rows < SLAB_ROWS:
        return False
    in_features, out_features = weight.shape
    return out_features >= SLAB_COLUMNS and out_features % (SLABS * 128) == 0 and in_features % 64 == 0


def multiply_by_slabs(
    x: Float[Array, "T K"], weight: Mxfp8, *, dtype: DTypeLike, interpret: bool
) -> Float[Array, "T N"]:
    """x @ weight as the kernel that converts in registers gives it, up to the order of sums."""
    out: jax.Array | None = None
    columns = weight.shape[1] // SLABS
    for first in range(0, weight.shape[1], columns):
        values, scales = weight.values, weight.scales
        if out is not None:  # the floats of one slab are gone before those of the next are made
            values, out = lax.optimization_barrier((values, out))
        slab = Mxfp8(values[first : first + columns], scales[first : first + columns])
        out = _multiply_into(x, dequantize_columns(slab, x.dtype), out, first, weight.shape[1], dtype, interpret)
    assert out is not None
    return out


def _multiply_into(
    x: Float[Array, "T K"],
    slab: Float[Array, "n K"],
    out: Float[Array, "T N"] | None,
    first: int,
    out_features: int,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "T N"]:
    """Columns `first` on of x @ slab.T, in place of those of `out`; without one, all others stay unwritten."""
    num_rows, columns = x.shape[0], slab.shape[0]
    block_n = largest_divisor(columns, 256)
    launch = MatmulLaunch(128, block_n, 64, 1, Launch(8, 3) if block_n == 256 else Launch(4, 4))
    return triton_call(
        functools.partial(_slab_kernel, first=first, launch=launch, interpret=interpret),
        [x, slab, *([] if out is None else [out])],
        jax.ShapeDtypeStruct((num_rows, out_features), dtype),
        grid=(columns // block_n, ceil_div(num_rows, launch.block_m)),
        launch=launch.launch,
        name="matmul_slab",
        interpret=interpret,
        aliases={} if out is None else {2: 0},
    )


def _slab_kernel(x_ref: Any, slab_ref: Any, *refs: Any, first: int, launch: MatmulLaunch, interpret: bool) -> None:
    out_ref, (num_rows, in_features) = refs[-1], x_ref.shape
    row = pl.program_id(1) * launch.block_m + jnp.arange(launch.block_m, dtype=jnp.int32)
    at_row = jnp.minimum(row, num_rows - 1)[:, None]
    column = pl.program_id(0) * launch.block_n + jnp.arange(launch.block_n, dtype=jnp.int32)
    result = multiply_tile(
        lambda k: x_ref[at_row, (k + jnp.arange(launch.block_k, dtype=jnp.int32))[None, :]],
        WeightTiles((slab_ref,), columns_first=True),
        column,
        num_rows=launch.block_m, block_k=launch.block_k,
        begin=0, stop=in_features // launch.block_k, interpret=interpret,
    )  # fmt: skip
    store_rows(out_ref, row, row < num_rows, first + column, result)
