"""Sorts (token, expert) pairs by expert in the fewest launches that their number allows."""

from __future__ import annotations

from jaxtyping import Array, Int

from minimax_kernels.routed_experts.sort_few import can_sort_few, sort_few_pairs
from minimax_kernels.routed_experts.sort_many import can_sort_many, sort_many_pairs
from minimax_kernels.routed_experts.sorting import SortedPairs, sort_pairs


def sort_any_pairs(
    expert_ids: Int[Array, "T k"], num_experts: int, first_expert: Int[Array, ""] | int = 0, *, interpret: bool
) -> SortedPairs:
    """As `sort_pairs`."""
    if can_sort_few(expert_ids.size, num_experts):
        return sort_few_pairs(expert_ids, num_experts, first_expert, interpret=interpret)
    if can_sort_many(expert_ids.size, num_experts):
        return sort_many_pairs(expert_ids, num_experts, first_expert, interpret=interpret)
    return sort_pairs(expert_ids, num_experts, first_expert)
