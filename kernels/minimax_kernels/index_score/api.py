"""index_score: what the index branch thinks of each block of keys."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels import checks
from minimax_kernels.batch import Batch
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.index_score import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.index_score, reference.index_score)


def index_score(
    idx_q: Float[Array, "T Hi D"], index_cache: Float[Array, "P B D"], batch: Batch, *, impl: str | None = None
) -> Float[Array, "Hi T N"]:
    """Scores blocks: the largest q.k over the keys of a block that the token may see (unscaled, float32).

    A token at position p sees the keys 0..p of its own request. Blocks with no visible key, and the rows
    of padding tokens, score -inf. (MSA, arXiv 2606.13392: index branch, block max pooling.)

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_rank("idx_q", idx_q, "[T, Hi, D]")
    checks.check_rank("index_cache", index_cache, "[P, B, D]")
    checks.check_float("idx_q", idx_q)
    checks.check_cache("index_cache", index_cache)
    checks.check_extent("idx_q", "D", idx_q.shape[2], index_cache.shape[2], "in index_cache")
    checks.check_batch(batch, index_cache.shape[1])
    if 0 in (idx_q.shape[0], batch.num_requests, batch.num_blocks):
        return jnp.full((idx_q.shape[1], idx_q.shape[0], batch.num_blocks), -jnp.inf, jnp.float32)
    return dispatch("index_score", _IMPLEMENTATIONS, impl, idx_q, index_cache, batch)
