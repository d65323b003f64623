"""Routed experts of many tokens, MXFP8, products on Mosaic GPU: rows copied, [gate | up] joined, down, weighted sum.

Beside the two products five or six launches: pairs sorted, the table of tiles, rows copied to where the copy engine
reads them (only those that are here), and the weighted sum.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.grouped_matmul.gather_rows import gather_rows
from minimax_kernels.grouped_matmul.pallas_mosaic_gpu import INTERPRETED, MosaicLaunch, multiply_sorted
from minimax_kernels.grouped_matmul.row_tiles import cut_rows
from minimax_kernels.mosaic_support import require_mxfp8_weight
from minimax_kernels.routed_experts.combine import combine_rows
from minimax_kernels.routed_experts.sort_any import sort_any_pairs
from minimax_kernels.swiglu import Swiglu
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
    gate_up, down = require_mxfp8_weight(x, gate_up), require_mxfp8_weight(x, down)
    del num_experts  # tiles are cut once rows are counted
    if expert_ids.size == 0:
        return jnp.zeros_like(x) if addend is None else addend
    launch = INTERPRETED if interpret else MosaicLaunch()
    pairs = sort_any_pairs(expert_ids, gate_up.shape[0], first_expert, interpret=interpret)
    tiles = cut_rows(pairs.group_sizes, expert_ids.size, launch.widths, interpret=interpret)
    rows = gather_rows(x, pairs.group_sizes, pairs.source, interpret=interpret)
    gated = multiply_sorted(rows, gate_up, tiles, launch=launch, activation=activation, interpret=interpret)
    rows = multiply_sorted(gated, down, tiles, sorted_rows=expert_ids.size, launch=launch, interpret=interpret)
    return combine_rows(rows[None], pairs.place, weights, pairs.group_sizes, addend, dtype=x.dtype, interpret=interpret)
