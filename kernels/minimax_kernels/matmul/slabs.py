"""Very many rows times MXFP8 weights, half of their columns at a time.

With thousands of rows the conversion inside the product, which every tile of rows repeats, costs as much of the time as
the matrix units. Here XLA converts half of the columns once, and the product reads bfloat16. The halves use the same
memory one after the other, so that at no time all of a quantised weight exists in floats. Narrow weights, as those of
keys and values are, go together: one slab has half of the columns of each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
SLAB_COLUMNS = 512  # of a launch's weights; fewer are not worth three launches more
LEAST_TILE = 128  # columns of a slab's tile


def takes_slabs(weights: Sequence[Weight], num_rows: int) -> TypeGuard[Sequence[Mxfp8]]:
    """Whether `multiply_by_slabs` is the faster way."""
    if num_rows < SLAB_ROWS or not all(isinstance(weight, Mxfp8) for weight in weights):
        return False
    columns = [weight.shape[1] for weight in weights]
    if sum(columns) < SLAB_COLUMNS:
        return False
    even = all(width % (SLABS * LEAST_TILE // 2) == 0 for width in columns) and sum(columns) % (SLABS * LEAST_TILE) == 0
    return even and weights[0].shape[0] % 64 == 0


def multiply_by_slabs(
    x: Float[Array, "T K"], weights: Sequence[Mxfp8], *, dtype: DTypeLike, interpret: bool
) -> tuple[Float[Array, "T N"], ...]:
    """x @ weight for each as the kernel that converts in registers gives it, up to the order of sums."""
    outs: tuple[jax.Array, ...] = ()
    widths = [weight.shape[1] for weight in weights]
    for part in range(SLABS):
        arrays = [(weight.values, weight.scales) for weight in weights]
        if outs:  # the floats of one slab are gone before those of the next are made
            arrays, outs = lax.optimization_barrier((arrays, outs))
        slab = [
            dequantize_columns(Mxfp8(values[first : first + columns], scales[first : first + columns]), x.dtype)
            for (values, scales), columns in zip(arrays, (width // SLABS for width in widths), strict=True)
            for first in (part * columns,)
        ]
        outs = _multiply_into(x, jnp.concatenate(slab), outs, part, widths, dtype, interpret)
    return outs


def _multiply_into(
    x: Float[Array, "T K"],
    slab: Float[Array, "n K"],
    outs: Sequence[Float[Array, "T N"]],
    part: int,
    widths: Sequence[int],
    dtype: DTypeLike,
    interpret: bool,
) -> tuple[Float[Array, "T N"], ...]:
    """x @ slab.T in place of a part of the columns of each of `outs`; without these, all others stay unwritten."""
    num_rows, columns = x.shape[0], slab.shape[0]
    block_n = largest_divisor(columns, 256) if len(widths) == 1 else LEAST_TILE
    launch = MatmulLaunch(128, block_n, 64, 1, Launch(8, 3) if block_n == 256 else Launch(4, 4))
    return triton_call(
        functools.partial(_slab_kernel, part=part, widths=widths, launch=launch, interpret=interpret),
        [x, slab, *outs],
        tuple(jax.ShapeDtypeStruct((num_rows, width), dtype) for width in widths),
        grid=(columns // block_n, ceil_div(num_rows, launch.block_m)),
        launch=launch.launch,
        name="matmul_slab",
        interpret=interpret,
        aliases={2 + i: i for i in range(len(outs))},
    )


def _slab_kernel(
    x_ref: Any, slab_ref: Any, *refs: Any, part: int, widths: Sequence[int], launch: MatmulLaunch, interpret: bool
) -> None:
    out_refs, (num_rows, in_features) = refs[-len(widths) :], x_ref.shape
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
    begin = 0
    for width, out_ref in zip(widths, out_refs, strict=True):  # a tile may have columns of several
        own = width // SLABS
        to, its = part * own - begin + column, None
        if len(widths) > 1:
            its = (column >= begin) & (column < begin + own)
            to = jnp.where(its, to, width) if interpret else to  # the interpreter masks by writing out of range
        store_rows(out_ref, row, row < num_rows, to, result, its=its)
        begin += own
