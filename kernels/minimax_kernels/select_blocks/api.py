"""select_blocks: the blocks of keys that each token attends to."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.batch import Batch
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.select_blocks import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.select_blocks, reference.select_blocks)


def select_blocks(
    scores: Float[Array, "Hi T N"],
    batch: Batch,
    *,
    topk: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    impl: str | None = None,
) -> Int[Array, "Hi T topk"]:
    """Picks, for each token and index head, the `topk` best visible blocks.

    The first `init_blocks` blocks and the last `local_blocks` up to the token's own are always taken and
    count inside `topk`. Of equal scores the lower block id wins; NaN ranks above every number,
    and above forced blocks.

    Args:
      scores: from `index_score`; -inf marks what a token cannot see.
      batch: whose padding rows select nothing.

    Returns:
      Logical block ids, valid ones first, -1 after them.

    Raises:
      ValueError: for shapes or options that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_rank("scores", scores, "[Hi, T, N]")
    checks.check_float("scores", scores)
    checks.check_selection(topk, init_blocks, local_blocks)
    checks.check_batch(batch)
    checks.check_extent("scores", "N", scores.shape[2], batch.num_blocks, "in batch.block_tables")
    if 0 in (*scores.shape, batch.num_requests):
        return jnp.full((*scores.shape[:2], topk), -1, jnp.int32)
    return dispatch(
        "select_blocks",
        _IMPLEMENTATIONS,
        impl,
        scores,
        batch,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
