"""Very many rows times MXFP8 weights, about half of their columns at a time.

With thousands of rows the conversion inside the product, which every tile of rows repeats, costs as much of the time as
the matrix units. Here XLA converts some of the columns once, and the product reads bfloat16. The slabs use the same
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

from minimax_kernels.launch_table import NUM_SMS
from minimax_kernels.matmul_launches import MatmulLaunch, largest_divisor
from minimax_kernels.mxfp8 import Mxfp8, dequantize_columns
from minimax_kernels.triton_call import Launch, ceil_div, triton_call
from minimax_kernels.weight_tiles import Weight, WeightTiles, multiply_tile, store_rows

SLAB_ROWS = 2048  # from which they pay
SLAB_COLUMNS = 512  # of a launch's weights; fewer are not worth three launches more
TILE_ROWS = 128
LEAST_TILE = 128  # columns of a slab's tile
WIDE_SLAB = 512  # columns whose tiles, with 8192 rows, are as many as there are multiprocessors


def takes_slabs(weights: Sequence[Weight], num_rows: int) -> TypeGuard[Sequence[Mxfp8]]:
    """Whether `multiply_by_slabs` is the faster way."""
    if num_rows < SLAB_ROWS or not all(isinstance(weight, Mxfp8) for weight in weights):
        return False
    columns = [weight.shape[1] for weight in weights]
    if sum(columns) < SLAB_COLUMNS:
        return False
    even = all(width % LEAST_TILE == 0 for width in columns) and sum(columns) % (2 * LEAST_TILE) == 0
    return even and weights[0].shape[0] % 64 == 0


def some_take_slabs(weights: Sequence[Weight], num_rows: int) -> bool:
    """Whether one of them by itself, or all together, do."""
    return any(takes_slabs([weight], num_rows) for weight in weights) or takes_slabs(weights, num_rows)


def multiply_by_slabs(
    x: Float[Array, "T K"], weights: Sequence[Mxfp8], *, dtype: DTypeLike, interpret: bool
) -> tuple[Float[Array, "T N"], ...]:
    """x @ weight for each as the kernel that converts in registers gives it, up to the order of sums."""
    outs: tuple[jax.Array, ...] = ()
    widths = [weight.shape[1] for weight in weights]
    cuts = [width // 2 for width in widths] if len(widths) > 1 else [_cut(widths[0])]
    for parts in ([(0, cut) for cut in cuts], list(zip(cuts, widths, strict=True))):
        arrays = [(weight.values, weight.scales) for weight in weights]
        if outs:  # the floats of one slab are gone before those of the next are made
            arrays, outs = lax.optimization_barrier((arrays, outs))
        slab = [
            dequantize_columns(Mxfp8(values[first:stop], scales[first:stop]), x.dtype)
            for (values, scales), (first, stop) in zip(arrays, parts, strict=True)
        ]
        outs = _multiply_into(x, jnp.concatenate(slab), outs, parts, widths, dtype, interpret)
    return outs


def _cut(width: int) -> int:
    """Columns of the first slab of one weight: half of them, or up to two thirds if its tiles fill the device so."""
    wide = ceil_div(width // 2, WIDE_SLAB) * WIDE_SLAB
    return wide if 3 * wide <= 2 * width else width // 2


def _multiply_into(
    x: Float[Array, "T K"],
    slab: Float[Array, "n K"],
    outs: Sequence[Float[Array, "T N"]],
    parts: Sequence[tuple[int, int]],
    widths: Sequence[int],
    dtype: DTypeLike,
    interpret: bool,
) -> tuple[Float[Array, "T N"], ...]:
    """x @ slab.T in place of some columns of each of `outs`; without these, all others stay unwritten.

    Args:
      parts: the first of these columns and the one after the last, for each.
    """
    num_rows, columns = x.shape[0], slab.shape[0]
    block_n = largest_divisor(columns, 2 * LEAST_TILE) if len(widths) == 1 else LEAST_TILE
    if columns // block_n * ceil_div(num_rows, TILE_ROWS) < NUM_SMS * 3 // 4:
        block_n = LEAST_TILE
    launch = MatmulLaunch(TILE_ROWS, block_n, 64, 1, Launch(8, 3) if block_n == 256 else Launch(4, 4))
    return triton_call(
        functools.partial(_slab_kernel, parts=parts, launch=launch, interpret=interpret),
        [x, slab, *outs],
        tuple(jax.ShapeDtypeStruct((num_rows, width), dtype) for width in widths),
        grid=(columns // block_n, ceil_div(num_rows, launch.block_m)),
        launch=launch.launch,
        name="matmul_slab",
        interpret=interpret,
        aliases={2 + i: i for i in range(len(outs))},
    )


def _slab_kernel(
    x_ref: Any, slab_ref: Any, *refs: Any, parts: Sequence[tuple[int, int]], launch: MatmulLaunch, interpret: bool
) -> None:
    out_refs, (num_rows, in_features) = refs[-len(parts) :], x_ref.shape
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
    for (first, stop), out_ref in zip(parts, out_refs, strict=True):  # a tile may have columns of several
        to, its = first - begin + column, None
        if len(parts) > 1:
            its = (column >= begin) & (column < begin + stop - first)
            # the interpreter masks by writing out of range
            to = jnp.where(its, to, out_ref.shape[1]) if interpret else to
        store_rows(out_ref, row, row < num_rows, to, result, its=its)
        begin += stop - first
