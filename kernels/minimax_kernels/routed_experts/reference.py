"""Routed experts in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.grouped_matmul.reference import grouped_matmul
from minimax_kernels.routed_experts.sorting import sort_pairs
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.weight_tiles import Weight


def routed_experts(
    x: Float[Array, "T H"],
    expert_ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: Weight,
    down: Weight,
    addend: Float[Array, "T H"] | None = None,
    *,
    activation: Swiglu,
    num_experts: int | None = None,
) -> Float[Array, "T H"]:
    """See `minimax_kernels.routed_experts`."""
    num_tokens, per_token = expert_ids.shape
    pairs = sort_pairs(expert_ids, gate_up.shape[0])
    gated = activation.halves(grouped_matmul(x[pairs.source], gate_up, pairs.group_sizes))
    rows = grouped_matmul(gated, down, pairs.group_sizes)
    outputs = rows[pairs.place].reshape(num_tokens, per_token, -1).astype(jnp.float32)
    total = (outputs * weights[..., None]).sum(axis=1).astype(x.dtype)
    return total if addend is None else total + addend
