"""Adds up each token's rows, weighted, in the token's own order of experts, and what the token gets besides."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minimax_kernels.matmul_launches import largest_divisor
from minimax_kernels.triton_call import Launch, ceil_div, next_power_of_two, triton_call

TOKENS, COLUMNS = 4, 512  # of a program
LAUNCH = Launch(num_warps=4, num_stages=1)


def combine_rows(
    rows: Float[Array, "splits R H"],
    place: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    group_sizes: Int[Array, "E"],
    addend: Float[Array, "T H"] | None = None,
    *,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "T H"]:
    """Sums weights * rows[place] in float32; rows past the last group's were never written and are not read.

    Args:
      rows: partial sums are added first, and rounded to `dtype` as a product without splits would have been.
      addend: added to the sum after that is rounded to `dtype`.
    """
    splits, _, hidden = rows.shape
    num_tokens, per_token = place.shape
    tokens, columns = min(TOKENS, next_power_of_two(num_tokens)), largest_divisor(hidden, COLUMNS)
    return triton_call(
        functools.partial(_combine_kernel, splits=splits, per_token=per_token, tokens=tokens, columns=columns),
        [rows, place, weights, group_sizes, *([] if addend is None else [addend])],
        jax.ShapeDtypeStruct((num_tokens, hidden), dtype),
        grid=(ceil_div(num_tokens, tokens), hidden // columns),
        launch=LAUNCH,
        name="combine_rows",
        interpret=interpret,
    )


def _combine_kernel(
    rows_ref: Any, place_ref: Any, weights_ref: Any, sizes_ref: Any, *refs: Any,
    splits: int, per_token: int, tokens: int, columns: int,
) -> None:  # fmt: skip
    addends, out_ref = refs[:-1], refs[-1]
    num_tokens, num_groups = out_ref.shape[0], sizes_ref.shape[0]
    group = jnp.arange(next_power_of_two(num_groups), dtype=jnp.int32)
    written = jnp.sum(plgpu.load(sizes_ref.at[group], mask=group < num_groups, other=0), dtype=jnp.int32)
    token = pl.program_id(0) * tokens + jnp.arange(tokens, dtype=jnp.int32)
    column = pl.program_id(1) * columns + jnp.arange(columns, dtype=jnp.int32)
    at = jnp.minimum(token, num_tokens - 1)
    total = jnp.zeros((tokens, columns), jnp.float32)
    for choice in range(per_token):  # unrolled: the loads of all are under way together
        row = place_ref[at, jnp.full_like(at, choice)]
        here = jnp.broadcast_to((row < written)[:, None], total.shape)
        row = jnp.minimum(row, written)
        output = jnp.zeros((tokens, columns), jnp.float32)
        for split in range(splits):
            part = plgpu.load(
                rows_ref.at[jnp.full_like(row, split)[:, None], row[:, None], column[None, :]], mask=here, other=0.0
            )
            output += part.astype(jnp.float32)
        weight = weights_ref[at, jnp.full_like(at, choice)].astype(jnp.float32)
        total += output.astype(out_ref.dtype).astype(jnp.float32) * weight[:, None]
    total = total.astype(out_ref.dtype)
    for addend_ref in addends:  # one or none
        addend = addend_ref[at[:, None], column[None, :]].astype(jnp.float32)
        total = (total.astype(jnp.float32) + addend).astype(out_ref.dtype)
    plgpu.store(
        out_ref.at[jnp.where(token < num_tokens, token, num_tokens)[:, None], column[None, :]],
        total,
        mask=jnp.broadcast_to((token < num_tokens)[:, None], total.shape),
    )
