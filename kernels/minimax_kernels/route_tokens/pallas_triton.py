"""The router of few tokens in two launches: partial logits, and the choice, which adds them up itself.

The weight is float32 and read whole whatever the number of tokens: programs share out its inputs, a slice of columns
each, and multiply in float32, which matrix units would not (TF32 rounds to 11 bits).
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

from minimax_kernels.choose_experts.pallas_triton import choose_experts_of_sums
from minimax_kernels.launch_table import NUM_SMS
from minimax_kernels.triton_call import Launch, ceil_div, next_power_of_two, triton_call

MOST_TOKENS = 64  # a program's sums of all of them stay in registers
LEAST_TILE = 16  # of each axis of a product
COLUMNS, INPUTS = 32, 16  # of a program, and of one of its steps: more inputs would spill
MOST_SPLITS = 32
LAUNCH = Launch(num_warps=4, num_stages=4)

FEW_TOKENS = 4  # up to which a program keeps its part of the weight in registers and multiplies token by token
FEW_INPUTS = 128  # of a step of such a program, all loaded at once: 32 numbers a thread
FEW_SPLITS = 64
FEW_LAUNCH = Launch(num_warps=4, num_stages=1)


def route_tokens(
    x: Float[Array, "T H"],
    weight: Float[Array, "H E"],
    bias: Float[Array, "E"],
    *,
    num_chosen: int,
    scale: float,
    interpret: bool = False,
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """See `minimax_kernels.route_tokens`."""
    if x.shape[0] > MOST_TOKENS:
        raise NotImplementedError(f"pallas_triton: {x.shape[0]} tokens are more than {MOST_TOKENS}")
    if weight.shape[0] % INPUTS:
        raise NotImplementedError(f"pallas_triton: H = {weight.shape[0]} of the weight is not a multiple of {INPUTS}")
    sums = partial_logits(x, weight, interpret=interpret)
    return choose_experts_of_sums(sums, bias, num_chosen=num_chosen, scale=scale, interpret=interpret)


def partial_logits(
    x: Float[Array, "T H"], weight: Float[Array, "H E"], *, interpret: bool
) -> Float[Array, "splits T E"]:
    """What sums to x @ weight over the first axis, float32; each of a range of inputs."""
    num_tokens, (in_features, num_experts) = x.shape[0], weight.shape
    columns = max(min(next_power_of_two(num_experts), COLUMNS), LEAST_TILE)
    tiles = ceil_div(num_experts, columns)
    kernel: functools.partial[None]
    if num_tokens <= FEW_TOKENS:
        steps = ceil_div(in_features, FEW_INPUTS)
        per_split = ceil_div(steps, FEW_SPLITS)
        splits, launch = ceil_div(steps, per_split), FEW_LAUNCH
        kernel = functools.partial(_few_logits_kernel, columns=columns, per_split=per_split)
    else:
        steps = in_features // INPUTS
        splits, launch = min(NUM_SMS // tiles or 1, steps, MOST_SPLITS), LAUNCH
        kernel = functools.partial(
            _logits_kernel, rows=max(next_power_of_two(num_tokens), LEAST_TILE), columns=columns, steps=steps,
            per_split=ceil_div(steps, splits),
        )  # fmt: skip
    shape = (splits, num_tokens, num_experts)
    if num_tokens == 0:
        return jnp.zeros(shape, jnp.float32)
    return triton_call(
        kernel,
        [x, weight],
        jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(tiles, splits),
        launch=launch,
        name="router_logits",
        interpret=interpret,
    )  # fmt: skip


def _few_logits_kernel(x_ref: Any, weight_ref: Any, out_ref: Any, *, columns: int, per_split: int) -> None:
    (num_tokens, in_features), num_experts, split = x_ref.shape, weight_ref.shape[1], pl.program_id(1)
    column = pl.program_id(0) * columns + jnp.arange(columns, dtype=jnp.int32)
    whole = num_experts % columns == 0  # then neighbours are known to be neighbours, and four are one load
    at_column = (column if whole else jnp.minimum(column, num_experts - 1))[None, :]
    totals = [jnp.zeros((columns,), jnp.float32)] * num_tokens
    for step in range(per_split):
        inputs = (split * per_split + step) * FEW_INPUTS + jnp.arange(FEW_INPUTS, dtype=jnp.int32)
        there, at = inputs < in_features, jnp.minimum(inputs, in_features - 1)
        w = weight_ref[at[:, None], at_column]
        for token in range(num_tokens):
            x = plgpu.load(x_ref.at[jnp.full_like(at, token), at], mask=there, other=0.0).astype(jnp.float32)
            totals[token] += jnp.sum(x[:, None] * w, axis=0)
    to = jnp.minimum(column, num_experts)
    for token, total in enumerate(totals):
        plgpu.store(
            out_ref.at[jnp.full_like(to, split), jnp.full_like(to, token), to], total, mask=column < num_experts
        )


def _logits_kernel(
    x_ref: Any, weight_ref: Any, out_ref: Any, *, rows: int, columns: int, steps: int, per_split: int
) -> None:
    num_tokens, num_experts, split = x_ref.shape[0], weight_ref.shape[1], pl.program_id(1)
    row = jnp.arange(rows, dtype=jnp.int32)
    column = pl.program_id(0) * columns + jnp.arange(columns, dtype=jnp.int32)
    at_row = jnp.minimum(row, num_tokens - 1)[:, None]
    at_column = jnp.minimum(column, num_experts - 1)[None, :]
    inside = (row < num_tokens)[:, None]

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        inputs = i * INPUTS + jnp.arange(INPUTS, dtype=jnp.int32)
        there = jnp.broadcast_to(inside, (rows, INPUTS))  # rows that are not there take no traffic
        x = plgpu.load(x_ref.at[at_row, inputs[None, :]], mask=there, other=0.0).astype(jnp.float32)
        w = weight_ref[inputs[:, None], at_column]
        return total + lax.dot_general(
            x, w, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    begin, stop = split * per_split, jnp.minimum((split + 1) * per_split, steps)
    total = lax.fori_loop(begin, stop, step, jnp.zeros((rows, columns), jnp.float32))
    to = jnp.where(row < num_tokens, row, num_tokens)[:, None], jnp.minimum(column, num_experts)[None, :]
    plgpu.store(out_ref.at[(split, *to)], total, mask=inside & (column < num_experts)[None, :])
