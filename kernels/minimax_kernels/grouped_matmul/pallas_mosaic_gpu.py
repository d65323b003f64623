"""Sorted rows times MXFP8 weights of their groups on Mosaic GPU, for groups of a hundred rows and more; Hopper only.

Each multiprocessor has one program of three warpgroups for the whole call. One of them asks for tiles of rows and of
the weight, a few steps ahead (TMA); each of the other two turns bytes of 64 columns of the weight into bfloat16, in the
registers from which its `wgmma` reads them, and while one converts, the other's product runs. A byte is converted once
for all rows of a tile, up to 288: two accumulators of 144 rows.

Tiles are of one group each, its rows shared evenly among as few as hold them (`row_tiles`); programs take them in
turn, widest first, and each round in the other direction, so that all end at about the same time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from minimax_kernels.grouped_matmul.gather_rows import gather_rows
from minimax_kernels.grouped_matmul.mosaic_columns import STEP, TILE_COLUMNS, WORD, Columns, M
from minimax_kernels.grouped_matmul.mosaic_dequantize import dequantize_rows, load_scale_words, mark_special
from minimax_kernels.grouped_matmul.mosaic_results import split_halves, store_rows
from minimax_kernels.grouped_matmul.row_tiles import FIELDS, cut_rows
from minimax_kernels.launch_table import NUM_SMS
from minimax_kernels.mosaic_api import plgpu
from minimax_kernels.mosaic_support import require_mxfp8_weight
from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.swiglu import Swiglu

PRODUCER = 2  # the warpgroup that loads
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # a thread; a multiple of 8, 65536 in all


class _Tile(NamedTuple):
    """Scalars: num_rows rows of `group`, from first_row on; the result's are from result_row, column on."""

    group: jax.Array
    num_rows: jax.Array
    first_row: jax.Array
    result_row: jax.Array
    column: jax.Array


@dataclasses.dataclass(frozen=True)
class MosaicLaunch:
    """Of a product of sorted rows.

    Attributes:
      widths: rows that tiles have room for, descending, multiples of 16; of 32 where a tile has two accumulators.
      stages: steps in flight, of 64 inputs: 45 KB each with 288 rows.
      programs: at most one a multiprocessor.
      most_rows: of an accumulator.
    """

    widths: tuple[int, ...] = (288, 256, 224, 192, 160, 96)
    stages: int = 5
    programs: int = NUM_SMS
    most_rows: int = 256


INTERPRETED = MosaicLaunch(widths=(32, 16), stages=2, programs=2, most_rows=16)


def grouped_matmul(
    x: Float[Array, "T K"], w: Float[Array, "E K N"] | Mxfp8, group_sizes: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "T N"]:
    """See `minimax_kernels.grouped_matmul`."""
    w = require_mxfp8_weight(x, w)
    num_rows, out_features = x.shape[0], w.shape[2]
    if num_rows == 0 or w.shape[0] == 0:
        return jnp.zeros((num_rows, out_features), x.dtype)
    launch = INTERPRETED if interpret else MosaicLaunch()
    tiles = cut_rows(group_sizes, num_rows, launch.widths, interpret=interpret)
    rows = gather_rows(x, group_sizes, interpret=interpret)
    result = multiply_sorted(rows, w, tiles, sorted_rows=num_rows, launch=launch, interpret=interpret)
    written = jnp.arange(num_rows, dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
    return jnp.where(written[:, None], result, 0)


def multiply_sorted(
    x: Float[Array, "R K"],
    w: Mxfp8,
    tiles: Int[Array, "tiles+1 5"],
    *,
    sorted_rows: int | None = None,
    launch: MosaicLaunch,
    activation: Swiglu | None = None,
    interpret: bool,
) -> Float[Array, "R N"] | Float[Array, "T N"]:
    """The kernel: bfloat16 rows in eights times their groups' weights; rows of no tile are not written.

    Args:
      w: [E, K, N], K a multiple of 128 and N of 128.
      tiles: of `row_tiles.cut_rows` with the launch's widths.
      sorted_rows: how many; None for a result that is in eights itself.
      activation: with w [E, K, 2 * N] of [gate | up], joins the halves.
    """
    in_features = x.shape[1]
    result_rows = x.shape[0] if sorted_rows is None else sorted_rows
    columns = Columns.WHOLE if activation is None else Columns.HALVES
    out_features = w.shape[2] if activation is None else w.shape[2] // 2
    room = launch.widths[0]
    assert in_features % WORD == 0 and out_features % columns.outputs == 0, w.shape
    if interpret or x.shape[0] < room:  # the copy engine fills what is past the array, but copies no more than it has
        x = jnp.pad(x, ((0, room), (0, 0)))
    swizzled = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(2 * STEP))
    per_stage: dict[str, Any] = {"num_barriers": launch.stages}
    with jax.enable_x64(False):
        return plgpu.kernel(
            functools.partial(
                _program, columns=columns, activation=activation, launch=launch, in_eights=sorted_rows is None,
                interpret=interpret,
            ),
            out_type=jax.ShapeDtypeStruct((result_rows, out_features), x.dtype),
            grid=(launch.programs,),
            grid_names=("program",),
            num_threads=3,
            thread_name="warpgroup",
            scratch_types={
                "rows_smem": plgpu.SMEM((launch.stages, room, STEP), x.dtype, transforms=swizzled),
                "values_smem": plgpu.SMEM((launch.stages, TILE_COLUMNS, STEP), w.values.dtype),
                "rows_here": plgpu.Barrier(**per_stage, num_arrivals=2),
                "values_here": plgpu.Barrier(**per_stage, num_arrivals=1 if activation is None else 2),
                "free": plgpu.Barrier(**per_stage, num_arrivals=2),
                "sums_smem": (plgpu.SMEM((2, M, room), jnp.float32),) if interpret else (),
            },
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            interpret=plgpu.InterpretGPUParams() if interpret else None,
            kernel_name="grouped_matmul" if activation is None else "grouped_matmul_swiglu",
        )(tiles, x, w.values, w.scales)  # fmt: skip


def _program(
    tiles_ref: Any, rows_ref: Any, values_ref: Any, scales_ref: Any, out_ref: Any, *, rows_smem: Any, values_smem: Any,
    rows_here: Any, values_here: Any, free: Any, sums_smem: tuple[Any, ...], columns: Columns,
    activation: Swiglu | None, launch: MosaicLaunch, in_eights: bool, interpret: bool,
) -> None:  # fmt: skip
    steps = rows_ref.shape[1] // STEP
    column_tiles = out_ref.shape[1] // columns.outputs
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    num_tiles = tiles_ref[0, 0] * column_tiles
    rounds = lax.div(num_tiles + (launch.programs - 1), launch.programs)

    def next_slot(slot: jax.Array) -> jax.Array:
        return jnp.where(slot == launch.stages - 1, 0, slot + 1)

    def each_tile(of_width: Callable[[int, _Tile], Callable[[Any], Any]], state: Any) -> Any:
        """Passes a state through of_width(width, tile) for each of this program's tiles."""

        def turn(i: jax.Array, state: Any) -> Any:
            backwards = lax.rem(i, 2) == 1
            index = i * launch.programs + jnp.where(backwards, launch.programs - 1 - program, program)
            entry = 1 + lax.div(index, column_tiles)
            column = lax.rem(index, column_tiles) * columns.outputs

            def run(state: Any) -> Any:
                group, num_rows, width, first, first_sorted = (tiles_ref[entry, field] for field in range(FIELDS))
                tile = _Tile(group, num_rows, first, first if in_eights else first_sorted, column)
                return lax.switch(width, [of_width(width, tile) for width in launch.widths], state)

            return lax.cond(index < num_tiles, run, lambda state: state, state)

        return lax.fori_loop(0, rounds, turn, state)

    @pl.when(warpgroup == PRODUCER)
    def _load() -> None:
        if not interpret:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        def load_tile(width: int, tile: _Tile) -> Callable[[Any], Any]:
            def load_step(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                slot, loaded = state
                pl.when(loaded >= launch.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                inputs = pl.ds(step * STEP, STEP)
                parts = [(tile.column, 0, TILE_COLUMNS)]
                if columns is Columns.HALVES:
                    parts = [(tile.column + half * out_ref.shape[1], half * M, M) for half in range(2)]
                for first, to, size in parts:
                    plgpu.copy_gmem_to_smem(
                        values_ref.at[tile.group, pl.ds(first, size), inputs],
                        values_smem.at[slot, pl.ds(to, size)], values_here.at[slot],
                    )  # fmt: skip
                for half in range(2):
                    plgpu.copy_gmem_to_smem(
                        rows_ref.at[pl.ds(tile.first_row + half * (width // 2), width // 2), inputs],
                        rows_smem.at[slot, pl.ds(half * (width // 2), width // 2)], rows_here.at[slot],
                    )  # fmt: skip
                return next_slot(slot), loaded + 1

            return functools.partial(lax.fori_loop, 0, steps, load_step)

        slot, loaded = each_tile(load_tile, (jnp.int32(0), jnp.int32(0)))

        def await_free(_: jax.Array, slot: jax.Array) -> jax.Array:
            plgpu.barrier_wait(free.at[slot])
            return next_slot(slot)

        # before shared memory goes
        slot = lax.fori_loop(loaded, jnp.maximum(loaded, launch.stages), lambda _, slot: next_slot(slot), slot)
        lax.fori_loop(0, jnp.minimum(loaded, launch.stages), await_free, slot)

    @pl.when(warpgroup != PRODUCER)
    def _multiply() -> None:
        if not interpret:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

        def multiply_tile(width: int, tile: _Tile) -> Callable[[Any], Any]:
            parts = 1 if width <= launch.most_rows else 2
            part = width // parts

            def words(step: jax.Array) -> jax.Array:
                return load_scale_words(
                    scales_ref, tile.group, tile.column, jnp.minimum(step, steps // 2 - 1), columns, interpret=interpret
                )

            def run(slot: jax.Array, *sums: Any) -> jax.Array:
                def two_steps(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    slot, scales = state
                    following = words(i + 1)
                    special = mark_special(scales)
                    for half in range(2):
                        plgpu.barrier_wait(values_here.at[slot])
                        weight = dequantize_rows(
                            values_smem.at[slot], scales, special, columns, half=half, interpret=interpret
                        )
                        plgpu.barrier_wait(rows_here.at[slot])
                        for own, total in enumerate(sums):
                            rows = rows_smem.at[slot, pl.ds(own * part, part)]
                            _add_product(total, weight, rows, interpret=interpret)
                        if not interpret:
                            plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])
                        slot = next_slot(slot)
                    return slot, following

                slot, _ = lax.fori_loop(0, steps // 2, two_steps, (slot, words(jnp.int32(0))))
                for i, total in enumerate(sums):
                    result = total[...]
                    if activation is not None:
                        result = activation(*split_halves(result, interpret=interpret))
                    store_rows(
                        out_ref, result.astype(out_ref.dtype), tile.result_row + i * part, tile.column,
                        tile.num_rows - i * part, columns, interpret=interpret,
                    )  # fmt: skip
                return slot

            def start(slot: jax.Array) -> jax.Array:
                if not interpret:
                    return pl.run_scoped(functools.partial(run, slot), *[plgpu.ACC((M, part), jnp.float32)] * parts)
                sums = [sums_smem[0].at[warpgroup, :, pl.ds(i * part, part)] for i in range(parts)]
                for total in sums:
                    total[...] = jnp.zeros(total.shape, total.dtype)
                return run(slot, *sums)

            return start

        each_tile(multiply_tile, jnp.int32(0))


def _add_product(total: Any, weight: jax.Array, rows: Any, *, interpret: bool) -> None:
    """total [64, n] += weight [64, 64] @ rows [n, 64].T, asynchronously."""
    if interpret:  # its wgmma takes no operand from registers
        total[...] += weight.astype(jnp.float32) @ rows[...].astype(jnp.float32).T
    else:
        plgpu.wgmma(total, weight, rows.T)
