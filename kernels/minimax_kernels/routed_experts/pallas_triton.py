"""Routed experts in three launches: [gate | up] with its activation, down, and the weighted sum; one or two more sort.

Nothing is padded to the number of experts and no row is copied: the first product gathers its rows, programs find
their expert by themselves, experts without tokens are not read, and pairs of experts elsewhere are never computed.
With a handful of tokens the inputs are split over programs, and a launch more adds up and joins the halves.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.grouped_matmul.pallas_triton import multiply_groups
from minimax_kernels.matmul.sum_splits import sum_splits
from minimax_kernels.matmul_launches import group_launch, largest_divisor
from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.routed_experts.combine import combine_rows
from minimax_kernels.routed_experts.sort_any import sort_any_pairs
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.triton_support import require_weight
from minimax_kernels.weight_tiles import Weight


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
    interpret: bool = False,
) -> Float[Array, "T H"]:
    """See `minimax_kernels.routed_experts`."""
    require_weight(x, gate_up, interpret=interpret)
    require_weight(x, down, interpret=interpret)
    if expert_ids.size == 0:
        return jnp.zeros_like(x) if addend is None else addend
    local, hidden, width = gate_up.shape
    num_rows = expert_ids.size
    pairs = sort_any_pairs(expert_ids, local, first_expert, interpret=interpret)
    rows_here = num_rows if num_experts is None else min(max(num_rows * local // num_experts, 1), num_rows)
    half = largest_divisor(width // 2, 1 << 30)
    sizes: dict[str, Any] = {"all_rows": num_rows, "quantized": isinstance(gate_up, Mxfp8)}
    launch = group_launch(rows_here, local, hidden, half, width, joined=True, **sizes)
    joined = launch.splits == 1
    gated = multiply_groups(
        x, gate_up, pairs.group_sizes, source=pairs.source, activation=activation if joined else None,
        launch=launch, interpret=interpret,
    )  # fmt: skip
    if not joined:
        (gated,) = sum_splits([gated], dtype=x.dtype, activation=activation, interpret=interpret)
    sizes["quantized"] = isinstance(down, Mxfp8)
    launch = group_launch(rows_here, local, down.shape[1], hidden, hidden, **sizes)
    rows = multiply_groups(gated, down, pairs.group_sizes, launch=launch, interpret=interpret)
    if launch.splits == 1:
        rows = rows[None]
    return combine_rows(rows, pairs.place, weights, pairs.group_sizes, addend, dtype=x.dtype, interpret=interpret)
