"""Adds up the partial sums of several products, or of [gate | up] and joins the halves, in one launch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels.swiglu import Swiglu
from minimax_kernels.triton_call import Launch, ceil_div, triton_call

ELEMENTS = 512  # of a program
JOINED = 256  # the same where each is of two sums
LAUNCH = Launch(num_warps=4, num_stages=1)


def sum_splits(
    partials: Sequence[Float[Array, "splits T N"]],
    *,
    dtype: DTypeLike,
    interpret: bool,
    activation: Swiglu | None = None,
) -> tuple[Float[Array, "T N"], ...]:
    """Each array's sum over its first axis, in order, rounded to `dtype`; the number of splits is the same for all.

    Args:
      activation: joins the halves of each rounded sum [T, 2 * N].
    """
    elements, halves = (ELEMENTS, 1) if activation is None else (JOINED, 2)
    splits = partials[0].shape[0]
    shapes = [(partial.shape[1], partial.shape[2] // halves) for partial in partials]
    firsts = list(itertools.accumulate((ceil_div(rows * columns, elements) for rows, columns in shapes), initial=0))
    sums = triton_call(
        functools.partial(
            _sum_kernel, firsts=firsts, splits=splits, elements=elements, activation=activation,
            widths=[columns for _, columns in shapes],
        ),
        [partial.reshape(splits, -1) for partial in partials],
        tuple(jax.ShapeDtypeStruct((rows * columns,), dtype) for rows, columns in shapes),
        grid=(firsts[-1],),
        launch=LAUNCH,
        name="sum_splits" if activation is None else "sum_splits_swiglu",
        interpret=interpret,
    )  # fmt: skip
    return tuple(total.reshape(shape) for total, shape in zip(sums, shapes, strict=True))


def _sum_kernel(
    *refs: Any, firsts: list[int], splits: int, elements: int, activation: Swiglu | None, widths: list[int]
) -> None:
    program, count = pl.program_id(0), len(firsts) - 1

    def add_up(i: int) -> None:
        partial_ref, out_ref = refs[i], refs[count + i]
        size = out_ref.shape[0]
        element = (program - firsts[i]) * elements + jnp.arange(elements, dtype=jnp.int32)
        at = jnp.minimum(element, size - 1)

        def total_at(at: jax.Array) -> jax.Array:
            total = partial_ref[0, at]
            for split in range(1, splits):  # unrolled: all loads are under way together
                total += partial_ref[split, at]
            return total.astype(out_ref.dtype)

        if activation is None:
            result = total_at(at)
        else:  # element (row, column) is of (row, column) and (row, N + column) of rows that are 2 * N wide
            gate = at + lax.div(at, widths[i]) * widths[i]
            result = activation(total_at(gate), total_at(gate + widths[i])).astype(out_ref.dtype)
        plgpu.store(out_ref.at[jnp.minimum(element, size)], result, mask=element < size)

    for i in range(count):
        pl.when((program >= firsts[i]) & (program < firsts[i + 1]))(functools.partial(add_up, i))
