"""Exact top-k selection of blocks: a program a row of scores, in two passes over it (`candidates`).

Rows with too many candidates, which takes many equal scores, are searched by repeated maxima instead (`maxima`).
Those have more than 2 topk visible blocks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.batch import Batch
from minimax_kernels.launch_table import select_launch
from minimax_kernels.select_blocks.candidates import choose_candidates, num_cells
from minimax_kernels.select_blocks.maxima import choose_by_maxima
from minimax_kernels.triton_call import triton_call


def select_blocks(
    scores: Float[Array, "Hi T N"],
    batch: Batch,
    *,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    interpret: bool = False,
) -> Int[Array, "Hi T topk"]:
    """See `minimax_kernels.select_blocks`."""
    num_heads, num_tokens, num_blocks = scores.shape
    if topk > 64:
        raise NotImplementedError(f"pallas_triton: topk = {topk} is more than 64")
    launch = select_launch(num_tokens * num_heads, num_blocks)
    kernel = functools.partial(
        _select_kernel,
        num_blocks=num_blocks,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        interpret=interpret,
        num_warps=launch.num_warps,
    )
    selected, _ = triton_call(
        kernel,
        (scores.astype(jnp.float32), batch.query_starts),
        (
            jax.ShapeDtypeStruct((num_heads, num_tokens, topk), jnp.int32),
            jax.ShapeDtypeStruct((num_heads, num_tokens, 2, num_cells(topk)), jnp.int32),
        ),
        grid=(num_tokens, num_heads),
        launch=launch,
        name="select_blocks",
        interpret=interpret,
    )
    return selected


def _select_kernel(
    scores_ref, starts_ref, out_ref, cells_ref, *,
    num_blocks, topk, init_blocks, local_blocks, num_warps, interpret,
):  # fmt: skip
    row, head = pl.program_id(0), pl.program_id(1)
    is_live = row < starts_ref[starts_ref.shape[0] - 1]

    def load(block):
        inside = block < num_blocks
        at = scores_ref.at[head, row, jnp.minimum(block, num_blocks - 1)]
        return plgpu.load(at, mask=inside & is_live, other=-jnp.inf)

    options = {"num_blocks": num_blocks, "topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}
    count, own = choose_candidates(
        load, cells_ref, out_ref, (head, row), **options, num_warps=num_warps, interpret=interpret
    )

    @pl.when(count > num_cells(topk))
    def _search():
        best_block = choose_by_maxima(load, own, **options)
        slot = jnp.arange(best_block.shape[0], dtype=jnp.int32)
        to = jnp.where(slot < topk, slot, topk)  # out of range where nothing is written
        plgpu.store(out_ref.at[head, row, to], best_block, mask=slot < topk)
