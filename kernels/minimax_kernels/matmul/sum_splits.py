"""Adds up the partial sums of several products in one launch; XLA takes one for each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_kernels.triton_call import Launch, ceil_div, triton_call

ELEMENTS = 512  # of a program
LAUNCH = Launch(num_warps=4, num_stages=1)


def sum_splits(
    partials: Sequence[Float[Array, "splits T N"]], *, dtype: DTypeLike, interpret: bool
) -> tuple[Float[Array, "T N"], ...]:
    """Each array's sum over its first axis, in order, rounded to `dtype`; the number of splits is the same for all."""
    splits = partials[0].shape[0]
    flat = [partial.reshape(splits, -1) for partial in partials]
    firsts = list(itertools.accumulate((ceil_div(x.shape[1], ELEMENTS) for x in flat), initial=0))
    sums = triton_call(
        functools.partial(_sum_kernel, firsts=firsts, splits=splits),
        flat,
        tuple(jax.ShapeDtypeStruct((x.shape[1],), dtype) for x in flat),
        grid=(firsts[-1],),
        launch=LAUNCH,
        name="sum_splits",
        interpret=interpret,
    )
    return tuple(total.reshape(partial.shape[1:]) for total, partial in zip(sums, partials, strict=True))


def _sum_kernel(*refs: Any, firsts: list[int], splits: int) -> None:
    program, count = pl.program_id(0), len(firsts) - 1

    def add_up(i: int) -> None:
        partial_ref, out_ref = refs[i], refs[count + i]
        size = out_ref.shape[0]
        element = (program - firsts[i]) * ELEMENTS + jnp.arange(ELEMENTS, dtype=jnp.int32)
        at = jnp.minimum(element, size - 1)
        total = partial_ref[0, at]
        for split in range(1, splits):  # unrolled: all loads are under way together
            total += partial_ref[split, at]
        plgpu.store(out_ref.at[jnp.minimum(element, size)], total.astype(out_ref.dtype), mask=element < size)

    for i in range(count):
        pl.when((program >= firsts[i]) & (program < firsts[i + 1]))(functools.partial(add_up, i))
