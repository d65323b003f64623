"""Exact top-k selection of blocks in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels.batch import Batch


def select_blocks(
    scores: Float[Array, "Hi T N"], batch: Batch, *, topk: int, init_blocks: int, local_blocks: int
) -> Int[Array, "Hi T topk"]:
    """See `minimax_kernels.select_blocks`."""
    num_tokens, num_blocks = scores.shape[1:]
    live = jnp.arange(num_tokens) < batch.query_starts[-1]
    visible = (scores != -jnp.inf) & live[:, None]  # a NaN score is visible, and the highest, as in torch
    blocks = jnp.arange(num_blocks)
    local = visible.sum(axis=-1, keepdims=True) - 1  # the visible blocks of a token are 0 .. its own
    forced = visible & ((blocks < init_blocks) | (blocks > local - local_blocks))
    # NaN > +inf and forced > numbers, without a NaN: on GPUs XLA's top-k of 1024 values and more loses those
    most = jnp.finfo(scores.dtype).max
    ordered = jnp.where(jnp.isnan(scores), jnp.inf, jnp.minimum(scores, most))
    ordered = jnp.where(ordered == 0, 0, ordered)  # top_k puts -0.0 below 0.0
    keys = jnp.where(forced, most, jnp.where(visible, ordered, -jnp.inf))
    best, ids = jax.lax.top_k(keys, min(topk, num_blocks))  # of equal scores the lower id comes first
    ids = jnp.where(best != -jnp.inf, ids, -1).astype(jnp.int32)
    return jnp.pad(ids, ((0, 0), (0, 0), (0, topk - ids.shape[-1])), constant_values=-1)
