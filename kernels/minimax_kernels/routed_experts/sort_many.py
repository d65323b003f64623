"""Sorts many (token, expert) pairs by expert in two launches: programs count their own pairs, then each places them.

A sort by comparing knows nothing of there being few experts: XLA's takes eight launches and reads every pair as often.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from minimax_kernels.routed_experts.sort_few import choices, one_number, store_places
from minimax_kernels.routed_experts.sorting import SortedPairs
from minimax_kernels.triton_call import Launch, ceil_div, next_power_of_two, triton_call

CELLS = 1 << 14  # pairs times experts, of a program
MOST_COUNTS = 1 << 15  # programs times experts: each program reads all of them
LAUNCH = Launch(num_warps=8, num_stages=1)


def can_sort_many(num_pairs: int, num_experts: int) -> bool:
    """Whether `sort_many_pairs` takes so many."""
    experts = next_power_of_two(num_experts + 1)
    return experts <= CELLS // 32 and next_power_of_two(ceil_div(num_pairs, CELLS // experts)) * experts <= MOST_COUNTS


def sort_many_pairs(
    expert_ids: Int[Array, "T k"], num_experts: int, first_expert: Int[Array, ""] | int = 0, *, interpret: bool
) -> SortedPairs:
    """As `sort_pairs`."""
    ids, first = expert_ids.reshape(-1), one_number(first_expert)
    experts = next_power_of_two(num_experts + 1)
    pairs = CELLS // experts
    programs = ceil_div(ids.shape[0], pairs)
    options: dict[str, Any] = {"grid": (programs,), "launch": LAUNCH, "interpret": interpret}
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    sizes: dict[str, Any] = {"pairs": pairs, "num_experts": num_experts}
    counts = triton_call(
        functools.partial(_count_kernel, **sizes),
        [ids, first],
        shape((programs, experts)),
        name="count_pairs",
        **options,
    )
    group_sizes, source, place = triton_call(
        functools.partial(_place_kernel, per_token=expert_ids.shape[1], **sizes),
        [ids, first, counts],
        (shape((num_experts,)), shape(ids.shape), shape(ids.shape)),
        name="place_pairs",
        **options,
    )
    return SortedPairs(group_sizes, source, place.reshape(expert_ids.shape))


def _own_pairs(pairs: int) -> Int[Array, "pairs"]:
    return pl.program_id(0) * pairs + jnp.arange(pairs, dtype=jnp.int32)


def _count_kernel(ids_ref: Any, first_ref: Any, counts_ref: Any, *, pairs: int, num_experts: int) -> None:
    chosen = choices(ids_ref, first_ref, _own_pairs(pairs), num_experts)
    expert = jnp.arange(chosen.shape[1], dtype=jnp.int32)
    counts_ref[jnp.full_like(expert, pl.program_id(0)), expert] = jnp.sum(chosen, axis=0, dtype=jnp.int32)


def _place_kernel(
    ids_ref: Any, first_ref: Any, counts_ref: Any, sizes_ref: Any, source_ref: Any, place_ref: Any, *,
    pairs: int, num_experts: int, per_token: int,
) -> None:  # fmt: skip
    programs, experts = counts_ref.shape
    program, expert = jnp.arange(next_power_of_two(programs), dtype=jnp.int32), jnp.arange(experts, dtype=jnp.int32)
    there = jnp.broadcast_to((program < programs)[:, None], (program.shape[0], experts))
    at = jnp.minimum(program, programs - 1)[:, None], expert[None, :]
    counts = plgpu.load(counts_ref.at[at], mask=there, other=0)
    sizes = jnp.sum(counts, axis=0, dtype=jnp.int32)
    before = jnp.sum(jnp.where((program < pl.program_id(0))[:, None], counts, 0), axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes + before
    pair = _own_pairs(pairs)
    store_places(
        pair, choices(ids_ref, first_ref, pair, num_experts), starts, source_ref, place_ref, per_token=per_token
    )
    first = (expert < num_experts) & (pl.program_id(0) == 0)
    plgpu.store(sizes_ref.at[jnp.minimum(expert, num_experts)], sizes, mask=first)
