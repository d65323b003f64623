"""The router's choice in one launch: a token's scores stay in registers, its best are taken one after another.

XLA sorts all scores and takes three launches for it. Logits may come as partial sums, which are added up here.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.triton_call import Launch, ceil_div, next_power_of_two, triton_call

TOKENS = 8  # of a program
MOST_EXPERTS, MOST_CHOSEN = 512, 16
LAUNCH = Launch(num_warps=4, num_stages=1)
LAUNCH_OF_SUMS = Launch(num_warps=1, num_stages=1)  # with sums to read a program takes one token: its warp never waits


def choose_experts(
    logits: Float[Array, "T E"],
    bias: Float[Array, "E"],
    *,
    num_chosen: int,
    scale: float,
    interpret: bool = False,
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """See `minimax_kernels.choose_experts`."""
    return choose_experts_of_sums(logits[None], bias, num_chosen=num_chosen, scale=scale, interpret=interpret)


def choose_experts_of_sums(
    sums: Float[Array, "splits T E"], bias: Float[Array, "E"], *, num_chosen: int, scale: float, interpret: bool
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """The choice of the logits that these are partial sums of: added up in order, in float32."""
    splits, num_tokens, num_experts = sums.shape
    if num_experts > MOST_EXPERTS or num_chosen > MOST_CHOSEN:
        raise NotImplementedError(
            f"pallas_triton: {num_chosen} of {num_experts} experts: at most {MOST_CHOSEN} of {MOST_EXPERTS}"
        )
    shape = (num_tokens, num_chosen)
    if num_tokens == 0:
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    tokens, launch = (TOKENS, LAUNCH) if splits == 1 else (1, LAUNCH_OF_SUMS)
    return triton_call(
        functools.partial(_choose_kernel, tokens=tokens, num_chosen=num_chosen, scale=scale),
        [sums, bias],
        (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)),
        grid=(ceil_div(num_tokens, tokens),),
        launch=launch,
        name="choose_experts",
        interpret=interpret,
    )


def _choose_kernel(
    sums_ref: Any, bias_ref: Any, ids_ref: Any, weights_ref: Any, *, tokens: int, num_chosen: int, scale: float
) -> None:
    splits, num_tokens, num_experts = sums_ref.shape
    token = pl.program_id(0) * tokens + jnp.arange(tokens, dtype=jnp.int32)
    expert = jnp.arange(next_power_of_two(num_experts), dtype=jnp.int32)
    real = expert < num_experts
    # where all are real, neighbours are known to be neighbours, and four are one load
    at_expert = expert if len(expert) == num_experts else jnp.minimum(expert, num_experts - 1)
    at = jnp.minimum(token, num_tokens - 1)[:, None], at_expert[None, :]
    logits = sums_ref[(0, *at)]
    for split in range(1, splits):  # unrolled: all loads are under way together
        logits += sums_ref[(split, *at)]
    scores = jax.nn.sigmoid(logits)
    left = jnp.where(real, scores + bias_ref[at[1]], -jnp.inf)
    # a token with a NaN chooses experts like any other, and its weights say what it is
    left = jnp.where(left == left, left, jnp.where(real, jnp.inf, -jnp.inf))
    column = jnp.arange(next_power_of_two(num_chosen), dtype=jnp.int32)[None, :]
    ids = jnp.zeros((tokens, column.shape[1]), jnp.int32)
    chosen = jnp.zeros(ids.shape, jnp.float32)
    free = jnp.broadcast_to(real[None, :], left.shape)
    for i in range(num_chosen):
        best = jnp.max(jnp.where(free, left, -jnp.inf), axis=1, keepdims=True)
        # of equal ones the first
        first = jnp.min(jnp.where(free & (left == best), expert[None, :], num_experts - 1), axis=1, keepdims=True)
        taken = expert[None, :] == first
        score = jnp.sum(jnp.where(taken, scores, 0.0), axis=1, keepdims=True)
        ids, chosen = jnp.where(column == i, first, ids), jnp.where(column == i, score, chosen)
        free = free & ~taken
    weights = chosen / jnp.sum(chosen, axis=1, keepdims=True) * scale
    inside = (token < num_tokens)[:, None] & (column < num_chosen)
    to = jnp.where(token < num_tokens, token, num_tokens)[:, None], column
    plgpu.store(ids_ref.at[to], ids, mask=inside)
    plgpu.store(weights_ref.at[to], weights, mask=inside)
