"""Routed experts in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.grouped_matmul.reference import grouped_matmul
from minimax_kernels.matmul.reference import matmul
from minimax_kernels.routed_experts.sorting import sort_pairs
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.weight_tiles import Weight

_FEW_TOKENS = 32  # beyond, products with experts that nobody chose cost more than copies


def routed_experts(
    x: Float[Array, "T H"],
    expert_ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: Weight,
    down: Weight,
    addend: Float[Array, "T H"] | None = None,
    first_expert: Int[Array, ""] | int = 0,
    *,
    activation: Swiglu,
    num_experts: int | None = None,
) -> Float[Array, "T H"]:
    """See `minimax_kernels.routed_experts`."""
    num_tokens, per_token = expert_ids.shape
    expert_ids = expert_ids.astype(jnp.int32) - first_expert
    if num_tokens <= _FEW_TOKENS and num_tokens * per_token >= gate_up.shape[0]:
        outputs = _outputs_of_all(x, expert_ids, gate_up, down, activation)
    else:
        pairs = sort_pairs(expert_ids, gate_up.shape[0])
        gated = activation.halves(grouped_matmul(x[pairs.source], gate_up, pairs.group_sizes))
        rows = grouped_matmul(gated, down, pairs.group_sizes)
        outputs = rows[pairs.place].reshape(num_tokens, per_token, -1)
    total = (outputs.astype(jnp.float32) * weights[..., None]).sum(axis=1).astype(x.dtype)
    return total if addend is None else total + addend


def _outputs_of_all(
    x: Float[Array, "T H"], expert_ids: Int[Array, "T k"], gate_up: Weight, down: Weight, activation: Swiglu
) -> Float[Array, "T k H"]:
    """Each token through all experts, of which it takes its own.

    Few tokens choose most experts between them: multiplying all costs less than a copy of the matrices for each pair.
    """
    num_experts = gate_up.shape[0]
    stacked = jnp.broadcast_to(x, (num_experts, *x.shape))
    (gated,) = matmul(stacked, (gate_up,), dtype=x.dtype, activation=activation)
    (rows,) = matmul(gated, (down,), dtype=x.dtype)
    ids = jnp.where(expert_ids < 0, num_experts, expert_ids)  # negative ids would count from the end
    return rows.at[ids, jnp.arange(x.shape[0])[:, None]].get(mode="fill", fill_value=0)
