"""Copies rows to where the copy engine can read them: in the order of experts, each expert's at a multiple of eight."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.grouped_matmul.row_tiles import EIGHT, group_starts, rows_in_eights
from minimax_kernels.matmul_launches import largest_divisor
from minimax_kernels.triton_call import Launch, triton_call

COLUMNS = 1024  # of a step
LAUNCH = Launch(num_warps=4, num_stages=1)


def gather_rows(
    x: Float[Array, "S K"], group_sizes: Int[Array, "E"], source: Int[Array, "T"] | None = None, *, interpret: bool
) -> Float[Array, "R K"]:
    """Rows of groups in eights (`row_tiles`); others, and rows past the last group's, are neither read nor written.

    Args:
      source: row of x for each sorted row; None if x's rows are sorted themselves.
    """
    sorted_rows = (x if source is None else source).shape[0]
    num_rows, features = rows_in_eights(sorted_rows, group_sizes.shape[0]), x.shape[1]
    return triton_call(
        functools.partial(_gather_kernel, columns=largest_divisor(features, COLUMNS), sorted_rows=sorted_rows),
        [x, group_sizes, *([] if source is None else [source])],
        jax.ShapeDtypeStruct((num_rows, features), x.dtype),
        grid=(num_rows // EIGHT,),
        launch=LAUNCH,
        name="gather_rows",
        interpret=interpret,
    )


def _gather_kernel(x_ref: Any, sizes_ref: Any, *refs: Any, columns: int, sorted_rows: int) -> None:
    *sources, out_ref = refs
    sizes, starts, starts_in_eights = group_starts(sizes_ref, sorted_rows)
    first = pl.program_id(0) * EIGHT
    within = first - starts_in_eights
    its = (within >= 0) & (within < sizes)  # one group's at most
    live = jnp.sum(jnp.where(its, sizes - within, 0), dtype=jnp.int32)
    first_sorted = jnp.sum(jnp.where(its, starts + within, 0), dtype=jnp.int32)

    @pl.when(live > 0)
    def _copy() -> None:
        row = jnp.arange(EIGHT, dtype=jnp.int32)
        source = first_sorted + jnp.where(row < live, row, 0)
        source = sources[0][source] if sources else source
        mask = jnp.broadcast_to((row < live)[:, None], (EIGHT, columns))

        def copy_step(i: jax.Array, _: None) -> None:
            column = i * columns + jnp.arange(columns, dtype=jnp.int32)[None, :]
            part = plgpu.load(x_ref.at[source[:, None], column], mask=mask, other=0)
            plgpu.store(out_ref.at[first + row[:, None], column], part, mask=mask)

        lax.fori_loop(0, x_ref.shape[1] // columns, copy_step, None)
