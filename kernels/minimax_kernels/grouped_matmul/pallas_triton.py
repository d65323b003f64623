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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.group_tiles import GroupTile, count_group_tiles, locate_group, num_group_tiles
from minimax_kernels.matmul_launches import MatmulLaunch, group_launch, largest_divisor
from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.triton_call import ceil_div, triton_call
from minimax_kernels.triton_support import require_weight
from minimax_kernels.weight_tiles import Weight, WeightTiles, multiply_tile, weight_refs

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
    expected_rows: int | None = None,
) -> Float[Array, "T N"] | Float[Array, "splits T N"]:
    """The kernel.

    Args:
      source: row of x for each sorted row; None if x's rows are sorted themselves.
      activation: with w [E, K, 2 * N] of [gate | up], joins the halves; only without splits.
      zero_rest: rows past the last group's become zeros; else they are not written.
      expected_rows: rows that groups will have in all, by a guess; with more, programs take several tiles each.

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
    tiles = most_tiles = num_group_tiles(num_rows, num_groups, launch.block_m, rest=zero_rest)
    if expected_rows is not None:  # a program without a tile takes a microsecond to find that out
        tiles = min(num_group_tiles(expected_rows + expected_rows // 8, num_groups, launch.block_m, rest=False), tiles)
    return triton_call(
        functools.partial(
            _group_kernel, quantized=isinstance(w, Mxfp8), gather=source is not None, activation=activation,
            zero_rest=zero_rest, one_tile=tiles == most_tiles, launch=launch, num_rows=num_rows,
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
    x_ref: Any, *refs: Any, quantized: bool, gather: bool, activation: Swiglu | None, zero_rest: bool, one_tile: bool,
    launch: MatmulLaunch, num_rows: int, steps: int, interpret: bool,
) -> None:  # fmt: skip
    weight, (sizes_ref, *sources, out_ref) = refs[: 1 + quantized], refs[1 + quantized :]
    num_groups, _, width = weight[0].shape
    find: dict[str, int] = {"tile": launch.block_m, "num_rows": num_rows, "num_groups": num_groups}
    column, split = pl.program_id(0) * launch.block_n, pl.program_id(2)
    per_split = ceil_div(steps, launch.splits)

    def rows_of(tile: GroupTile, size: int) -> tuple[jax.Array, jax.Array]:
        """(sorted rows, which of them are there) of a tile's first `size` rows."""
        offset = jnp.arange(size, dtype=jnp.int32)
        return tile.first_row + offset, offset < tile.num_rows

    def store(tile: GroupTile, result: jax.Array) -> None:
        row, live = rows_of(tile, result.shape[0])
        columns = column + jnp.arange(launch.block_n, dtype=jnp.int32)
        to = (jnp.where(live, row, num_rows)[:, None], columns[None, :])
        plgpu.store(
            out_ref.at[(split, *to) if launch.splits > 1 else to],
            result.astype(out_ref.dtype),
            mask=jnp.broadcast_to(live[:, None], result.shape),
        )

    def multiply(tile: GroupTile, size: int) -> None:
        row, live = rows_of(tile, size)
        at = jnp.where(live, row, tile.first_row)  # a row that is not there reads one that is
        at = sources[0][at] if gather else at
        inputs = jnp.arange(launch.block_k, dtype=jnp.int32)
        sums = multiply_tile(
            lambda k: x_ref[at[:, None], (k + inputs)[None, :]],
            WeightTiles(weight, tile.group),
            (column,) if activation is None else (column, column + width // 2),
            num_rows=size, block_n=launch.block_n, block_k=launch.block_k,
            begin=split * per_split, stop=jnp.minimum((split + 1) * per_split, steps), interpret=interpret,
        )  # fmt: skip
        if activation is None:
            store(tile, sums[0])
        else:  # of what the product alone would have given, in the type of the rows
            store(tile, activation(*(total.astype(x_ref.dtype) for total in sums)))

    def run(tile_id: jax.Array) -> None:
        tile = locate_group(sizes_ref, tile_id, **find)
        in_group = (tile.num_rows > 0) & (tile.group < num_groups)
        half = launch.block_m // 2
        if half >= LEAST_HALF_TILE:  # the last tile of a group is half empty on average
            pl.when(in_group & (tile.num_rows > half))(functools.partial(multiply, tile, launch.block_m))
            pl.when(in_group & (tile.num_rows <= half))(functools.partial(multiply, tile, half))
        else:
            pl.when(in_group)(functools.partial(multiply, tile, launch.block_m))
        if zero_rest:
            zeros = jnp.zeros((launch.block_m, launch.block_n), jnp.float32)
            pl.when((tile.num_rows > 0) & (tile.group == num_groups))(functools.partial(store, tile, zeros))

    if one_tile:
        run(pl.program_id(1))
    else:
        count = count_group_tiles(sizes_ref, **find, rest=zero_rest)
        first, step = pl.program_id(1), pl.num_programs(1)

        def run_next(i: jax.Array, carry: Any) -> Any:
            run(first + i * step)
            return carry

        lax.fori_loop(0, lax.div(count - first + step - 1, step), run_next, None)
