"""Sorts (token, expert) pairs by expert, without a word to the host."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

FEW_PAIRS = 512  # up to which comparing all with all beats a sort and a scatter


class SortedPairs(NamedTuple):
    """Pairs in the order of their experts, and among one's in their own order; pairs of experts elsewhere come last.

    Attributes:
      group_sizes: pairs of each expert here.
      source: the token of each sorted row.
      place: the sorted row of each token's pairs.
    """

    group_sizes: Int[Array, "E"]
    source: Int[Array, "T*k"]
    place: Int[Array, "T k"]


def sort_pairs(expert_ids: Int[Array, "T k"], num_experts: int, first_expert: Int[Array, ""] | int = 0) -> SortedPairs:
    """Sorts; ids outside first_expert..first_expert + num_experts - 1 stand for experts elsewhere."""
    num_tokens, per_token = expert_ids.shape
    ids = expert_ids.reshape(-1).astype(jnp.int32) - first_expert
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    pairs = jnp.arange(ids.shape[0], dtype=jnp.int32)
    group_sizes = (ids[:, None] == jnp.arange(num_experts, dtype=jnp.int32)).sum(axis=0, dtype=jnp.int32)
    if ids.shape[0] <= FEW_PAIRS:
        first = (ids[None, :] < ids[:, None]) | ((ids[None, :] == ids[:, None]) & (pairs[None, :] < pairs[:, None]))
        place = first.sum(axis=1, dtype=jnp.int32)
        source = jnp.where(place[None, :] == pairs[:, None], lax.div(pairs, per_token), 0).sum(axis=1, dtype=jnp.int32)
    else:
        # one key a pair, all different: half the bytes of sorting ids with their places
        order = lax.rem(lax.sort(ids * ids.shape[0] + pairs, is_stable=False), ids.shape[0])
        source = lax.div(order, per_token)
        place = jnp.zeros_like(order).at[order].set(pairs, unique_indices=True)
    return SortedPairs(group_sizes, source, place.reshape(num_tokens, per_token))
