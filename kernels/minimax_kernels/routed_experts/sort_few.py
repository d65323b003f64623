"""Sorts few (token, expert) pairs by expert in one launch, where XLA takes four: one program compares and counts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from minimax_kernels.routed_experts.sorting import SortedPairs
from minimax_kernels.triton_call import Launch, next_power_of_two, triton_call

MOST_CELLS = 1 << 14  # pairs times experts, in one program's registers
LAUNCH = Launch(num_warps=8, num_stages=1)


def can_sort_few(num_pairs: int, num_experts: int) -> bool:
    """Whether `sort_few_pairs` takes so many."""
    return next_power_of_two(num_pairs) * next_power_of_two(num_experts + 1) <= MOST_CELLS


def sort_few_pairs(
    expert_ids: Int[Array, "T k"], num_experts: int, first_expert: Int[Array, ""] | int = 0, *, interpret: bool
) -> SortedPairs:
    """As `sort_pairs`."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    sizes, source, place = triton_call(
        functools.partial(_sort_kernel, per_token=expert_ids.shape[1], num_experts=num_experts),
        [expert_ids.reshape(-1), one_number(first_expert)],
        (shape((num_experts,)), shape((expert_ids.size,)), shape((expert_ids.size,))),
        grid=(1,),
        launch=LAUNCH,
        name="sort_pairs",
        interpret=interpret,
    )
    return SortedPairs(sizes, source, place.reshape(expert_ids.shape))


def _sort_kernel(
    ids_ref: Any, first_ref: Any, sizes_ref: Any, source_ref: Any, place_ref: Any, *, per_token: int, num_experts: int
) -> None:
    pair = jnp.arange(next_power_of_two(ids_ref.shape[0]), dtype=jnp.int32)
    chosen = choices(ids_ref, first_ref, pair, num_experts)
    expert = jnp.arange(chosen.shape[1], dtype=jnp.int32)
    sizes = jnp.sum(chosen, axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    plgpu.store(sizes_ref.at[jnp.minimum(expert, num_experts)], sizes, mask=expert < num_experts)
    store_places(pair, chosen, starts, source_ref, place_ref, per_token=per_token)


def one_number(value: Int[Array, ""] | int) -> Int[Array, "1"]:
    """As an operand of a kernel."""
    return jnp.asarray(value, jnp.int32).reshape(1)


def choices(ids_ref: Any, first_ref: Any, pair: Int[Array, "n"], num_experts: int) -> Int[Array, "n experts"]:
    """Device side: 1 where a pair is there and chose the expert; number `num_experts` stands for those elsewhere.

    Args:
      first_ref: [1], the id of expert 0.
    """
    num_pairs = ids_ref.shape[0]
    expert = jnp.arange(next_power_of_two(num_experts + 1), dtype=jnp.int32)
    ids = ids_ref[jnp.minimum(pair, num_pairs - 1)].astype(jnp.int32) - first_ref[0]
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    return ((ids[:, None] == expert[None, :]) & (pair < num_pairs)[:, None]).astype(jnp.int32)


def store_places(
    pair: Int[Array, "n"],
    chosen: Int[Array, "n experts"],
    starts: Int[Array, "experts"],
    source_ref: Any,
    place_ref: Any,
    *,
    per_token: int,
) -> None:
    """Device side: writes the sorted row of each pair and each row's token.

    Args:
      starts: the sorted row of the first of these pairs that chose each expert.
    """
    num_pairs = place_ref.shape[0]
    real = pair < num_pairs
    earlier = jnp.cumsum(chosen, axis=0, dtype=jnp.int32) - chosen
    place = jnp.sum(chosen * (starts[None, :] + earlier), axis=1, dtype=jnp.int32)
    plgpu.store(place_ref.at[jnp.minimum(pair, num_pairs)], place, mask=real)
    plgpu.store(source_ref.at[jnp.where(real, place, num_pairs)], lax.div(pair, per_token), mask=real)
