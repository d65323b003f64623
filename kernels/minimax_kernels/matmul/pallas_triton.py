"""Rows times MXFP8 weights, or few rows times several arrays, in one kernel.

Few rows split the inputs over programs, so that all memory is read at once. An MXFP8 weight's bytes go from memory to
shared memory to registers, become bfloat16 there and meet the rows in the matrix units. With one split a program
writes its tile; with several they write float32 partial sums. XLA adds them up inside whatever reads the result; those
of several weights, or of [gate | up] whose halves are joined, are a launch of their own. Without splits the halves are
joined where the product ends. Thousands of rows take weights by slabs (`slabs.py`).
"""

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

from minimax_kernels.matmul import reference
from minimax_kernels.matmul.slabs import multiply_by_slabs, some_take_slabs, takes_slabs
from minimax_kernels.matmul.sum_splits import sum_splits
from minimax_kernels.matmul_launches import FEW_ROWS, MatmulLaunch, largest_divisor, matmul_launch
from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.swiglu import Swiglu, paired_columns
from minimax_kernels.triton_call import ceil_div, triton_call
from minimax_kernels.triton_support import require_weight
from minimax_kernels.weight_tiles import Weight, WeightTiles, multiply_tile, store_rows, weight_refs


def matmul(
    x: Float[Array, "T K"],
    weights: Sequence[Weight],
    *,
    dtype: DTypeLike,
    activation: Swiglu | None = None,
    interpret: bool = False,
    launch: MatmulLaunch | None = None,
) -> tuple[Float[Array, "T N"], ...]:
    """See `minimax_kernels.matmul`."""
    if left_to_xla(x, weights):
        raise NotImplementedError("pallas_triton: one array, or arrays and many rows, which XLA multiplies best")
    for weight in weights:
        require_weight(x, weight, interpret=interpret)
    if launch is None and some_take_slabs(weights, len(x)):
        products = _some_by_slabs(x, weights, dtype, interpret)
        return products if activation is None else tuple(map(activation.halves, products))
    if x.shape[0] == 0:
        return tuple(jnp.zeros((0, w.shape[1] // (1 if activation is None else 2)), dtype) for w in weights)
    options: dict[str, Any] = {"activation": activation, "dtype": dtype, "interpret": interpret}
    results = partial_products(x, weights, launch=launch, **options)
    if results[0].ndim == 2:
        return results
    if len(results) > 1 or activation is not None:
        return sum_splits(results, **options)
    return tuple(result.sum(axis=0).astype(dtype) for result in results)


def partial_products(
    x: Float[Array, "T K"],
    weights: Sequence[Weight],
    *,
    dtype: DTypeLike,
    interpret: bool,
    activation: Swiglu | None = None,
    launch: MatmulLaunch | None = None,
) -> tuple[Float[Array, "splits T N"], ...] | tuple[Float[Array, "T N"], ...]:
    """One launch: the products in `dtype`, or where inputs are split float32 partial sums, whose number all share.

    T is at least 1, and the weights are as `require_weight` wants them. Partial sums have no activation yet.
    """
    num_rows, in_features = x.shape
    widths = [weight.shape[1] for weight in weights]
    divisor = min(largest_divisor(width, 1 << 30) for width in widths)
    quantized = isinstance(weights[0], Mxfp8)
    launch = launch or matmul_launch(num_rows, in_features, divisor, sum(widths), quantized=quantized)
    ends = list(itertools.accumulate(widths, initial=0))
    joined = activation is not None and launch.splits == 1
    refs = [weight_refs(weight) for weight in weights]
    return triton_call(
        functools.partial(
            _matmul_kernel, ends=ends, parts=list(map(len, refs)), launch=launch,
            steps=in_features // launch.block_k, activation=activation if joined else None, interpret=interpret,
        ),
        [x, *itertools.chain.from_iterable(refs)],
        tuple(
            jax.ShapeDtypeStruct((launch.splits, num_rows, width), jnp.float32)
            if launch.splits > 1
            else jax.ShapeDtypeStruct((num_rows, width // 2 if joined else width), dtype)
            for width in widths
        ),
        grid=(ends[-1] // launch.block_n, ceil_div(num_rows, launch.block_m), launch.splits),
        launch=launch.launch,
        name="mxfp8_matmul" if quantized else "several_matmuls",
        interpret=interpret,
    )  # fmt: skip


def _some_by_slabs(
    x: Float[Array, "T K"], weights: Sequence[Weight], dtype: DTypeLike, interpret: bool
) -> tuple[Float[Array, "T N"], ...]:
    """Each wide weight by slabs of its own, the others together, by slabs or in one launch."""
    options: dict[str, Any] = {"dtype": dtype, "interpret": interpret}
    wide = [takes_slabs([weight], len(x)) for weight in weights]
    rest = [weight for weight, alone in zip(weights, wide, strict=True) if not alone]
    if takes_slabs(rest, len(x)):
        others = iter(multiply_by_slabs(x, rest, **options))
    elif left_to_xla(x, rest):  # or there is none
        others = iter(reference.matmul(x, rest, dtype=dtype))
    else:
        others = iter(matmul(x, rest, **options))
    return tuple(
        multiply_by_slabs(x, [weight], **options)[0] if alone and isinstance(weight, Mxfp8) else next(others)
        for weight, alone in zip(weights, wide, strict=True)
    )


def left_to_xla(x: jax.Array, weights: Sequence[Weight]) -> bool:
    """Arrays that XLA multiplies well. Several of them and few rows are not: it would join, hence copy, the arrays."""
    if any(isinstance(weight, Mxfp8) for weight in weights):
        return False
    return len(weights) == 1 or x.shape[0] > FEW_ROWS or x.dtype != jnp.bfloat16


def _matmul_kernel(
    x_ref: Any, *refs: Any, ends: list[int], parts: list[int], launch: MatmulLaunch, steps: int,
    activation: Swiglu | None, interpret: bool,
) -> None:  # fmt: skip
    weights, firsts = len(ends) - 1, list(itertools.accumulate(parts, initial=0))
    num_rows = x_ref.shape[0]
    column_tile, row_tile, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row = row_tile * launch.block_m + jnp.arange(launch.block_m, dtype=jnp.int32)
    at_row = jnp.minimum(row, num_rows - 1)[:, None]
    per_split = ceil_div(steps, launch.splits)
    begin = split * per_split

    def rows_at(k: jax.Array) -> jax.Array:
        at = x_ref.at[at_row, (k + jnp.arange(launch.block_k, dtype=jnp.int32))[None, :]]
        if num_rows >= launch.block_m:
            return plgpu.load(at)
        inside = jnp.broadcast_to(row[:, None] < num_rows, (launch.block_m, launch.block_k))
        return plgpu.load(at, mask=inside, other=0.0)  # rows that are not there take no memory traffic

    def multiply(i: int) -> None:
        out_ref, begin_column = refs[firsts[-1] + i], column_tile * launch.block_n - ends[i]
        column = columns = begin_column + jnp.arange(launch.block_n, dtype=jnp.int32)
        if activation is not None:  # the tile's columns are half of gate and half of up
            half = launch.block_n // 2
            column = column_tile * half + jnp.arange(half, dtype=jnp.int32)
            columns = paired_columns(column_tile * half, half, ends[-1])
        result = multiply_tile(
            rows_at,
            WeightTiles(refs[firsts[i] : firsts[i + 1]]),
            columns,
            num_rows=launch.block_m, block_k=launch.block_k,
            begin=begin, stop=jnp.minimum(begin + per_split, steps), interpret=interpret,
        )  # fmt: skip
        if activation is not None:  # of what the product alone would have given
            result = activation.of_tile(result.astype(out_ref.dtype))
        store_rows(out_ref, row, row < num_rows, column, result, (split,) if launch.splits > 1 else ())

    for i in range(weights):
        first, last = ends[i] // launch.block_n, ends[i + 1] // launch.block_n
        if weights == 1:
            multiply(i)
        else:
            pl.when((column_tile >= first) & (column_tile < last))(functools.partial(multiply, i))
