"""Sorted rows times the weights of their groups: one kernel, whose programs find their group by themselves.

A program takes up to block_m rows of one group, so a group without rows costs nothing and no row is padded in memory.
The weight's tile is read once for all of them; MXFP8 becomes bfloat16 in registers. Columns are the grid's fast axis:
tiles of one expert run soon after each other, while its weight is in the second-level cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.group_tiles import locate_group, num_group_tiles
from minimax_kernels.matmul_launches import MatmulLaunch, group_launch, largest_divisor
from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.swiglu import Swiglu, paired_columns
from minimax_kernels.triton_call import ceil_div, triton_call
from minimax_kernels.triton_support import require_weight
from minimax_kernels.weight_tiles import Weight, WeightTiles, multiply_tile, store_rows, weight_refs

LEAST_HALF_TILE = 64  # rows; smaller tiles are bound by reading the weight, not by arithmetic


def grouped_matmul(
    x: Float[Array, "T K"], w: Float[Array, "E K N"] | Mxfp8, group_sizes: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "T N"]:
    """See `minimax_kernels.grouped_matmul`."""
    require_weight(x, w, interpret=interpret)
    num_groups, in_features, out_features = w.shape
    if x.shape[0] == 0 or num_groups == 0:
        return jnp.zeros((x.shape[0], out_features), x.dtype)
    divisor = largest_divisor(out_features, 1 << 30)
    launch = group_launch(x.shape[0], num_groups, in_features, divisor, out_features, quantized=isinstance(w, Mxfp8))
    result = multiply_groups(x, w, group_sizes, launch=launch, zero_rest=True, interpret=interpret)
    return result.sum(axis=0).astype(x.dtype) if launch.splits > 1 else result


def multiply_groups(
    x: Float[Array, "S K"],
    w: Weight,
    group_sizes: Int[Array, "E"],
    *,
    launch: MatmulLaunch,
    interpret: bool,
    source: Int[Array, "T"] | None = None,
    activation: Swiglu | None = None,
    zero_rest: bool = False,
) -> Float[Array, "T N"] | Float[Array, "splits T N"]:
    """The kernel.

    Args:
      source: row of x for each sorted row; None if x's rows are sorted themselves.
      activation: with w [E, K, 2 * N] of [gate | up], joins the halves; only without splits.
      zero_rest: rows past the last group's become zeros; else they are not written.

    Returns:
      x's type; or, with splits, float32 partial sums, of w's full width.
    """
    num_groups, in_features, width = w.shape
    num_rows = x.shape[0] if source is None else source.shape[0]
    joined = activation is not None
    assert not (joined and launch.splits > 1)
    out_features = width // 2 if joined else width
    shape = (num_rows, out_features)
    assert num_rows > 0
    tiles = num_group_tiles(num_rows, num_groups, launch.block_m, rest=zero_rest)
    return triton_call(
        functools.partial(
            _group_kernel, quantized=isinstance(w, Mxfp8), gather=source is not None, activation=activation,
            zero_rest=zero_rest, launch=launch, num_rows=num_rows,
            steps=in_features // launch.block_k, interpret=interpret,
        ),
        [x, *weight_refs(w), group_sizes, *([] if source is None else [source])],
        jax.ShapeDtypeStruct((launch.splits, *shape), jnp.float32)
        if launch.splits > 1
        else jax.ShapeDtypeStruct(shape, x.dtype),
        grid=(out_features // launch.block_n, tiles, launch.splits),
        launch=launch.launch,
        name="grouped_matmul_swiglu" if joined else "grouped_matmul",
        interpret=interpret,
    )  # fmt: skip


def _group_kernel(
    x_ref: Any, *refs: Any, quantized: bool, gather: bool, activation: Swiglu | None, zero_rest: bool,
    launch: MatmulLaunch, num_rows: int, steps: int, interpret: bool,
) -> None:  # fmt: skip
    weight, (sizes_ref, *sources, out_ref) = refs[: 1 + quantized], refs[1 + quantized :]
    num_groups = weight[0].shape[0]
    column, split = pl.program_id(0) * launch.block_n, pl.program_id(2)
    per_split = ceil_div(steps, launch.splits)

    # a loop over tiles in place of a program each costs registers, hence half of the programs at a time
    tile = locate_group(sizes_ref, pl.program_id(1), tile=launch.block_m, num_rows=num_rows, num_groups=num_groups)

    def rows_of(size: int) -> tuple[jax.Array, jax.Array]:
        """(sorted rows, which of them are there) of the tile's first `size` rows."""
        offset = jnp.arange(size, dtype=jnp.int32)
        return tile.first_row + offset, offset < tile.num_rows

    def store(result: jax.Array) -> None:
        row, live = rows_of(result.shape[0])
        columns = column + jnp.arange(launch.block_n, dtype=jnp.int32)
        store_rows(out_ref, row, live, columns, result, (split,) if launch.splits > 1 else ())

    def multiply(size: int) -> None:
        row, live = rows_of(size)
        at = jnp.where(live, row, tile.first_row)
        at = sources[0][at] if gather else at
        inputs = jnp.arange(launch.block_k, dtype=jnp.int32)
        there = jnp.broadcast_to(live[:, None], (size, launch.block_k))  # rows that are not there take no traffic
        if activation is None:
            columns = column + jnp.arange(launch.block_n, dtype=jnp.int32)
        else:
            columns = paired_columns(column, launch.block_n, 2 * out_ref.shape[-1])
        total = multiply_tile(
            lambda k: plgpu.load(x_ref.at[at[:, None], (k + inputs)[None, :]], mask=there, other=0.0),
            WeightTiles(weight, tile.group),
            columns,
            num_rows=size, block_k=launch.block_k, begin=split * per_split,
            stop=jnp.minimum((split + 1) * per_split, steps), rows_first=size < launch.block_m, interpret=interpret,
        )  # fmt: skip
        if activation is None:
            store(total)
        else:  # of what the product alone would have given, in the type of the rows
            store(activation.of_tile(total.astype(x_ref.dtype)))

    in_group = (tile.num_rows > 0) & (tile.group < num_groups)
    half = launch.block_m // 2
    if half >= LEAST_HALF_TILE:  # the last tile of a group is half empty on average
        pl.when(in_group & (tile.num_rows > half))(functools.partial(multiply, launch.block_m))
        pl.when(in_group & (tile.num_rows <= half))(functools.partial(multiply, half))
    else:
        pl.when(in_group)(functools.partial(multiply, launch.block_m))
    if zero_rest:
        zeros = jnp.zeros((launch.block_m, launch.block_n), jnp.float32)
        pl.when((tile.num_rows > 0) & (tile.group == num_groups))(functools.partial(store, zeros))
