"""msa: score, select and attend in one call."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels import checks
from minimax_kernels.batch import Batch
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.msa import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.msa, reference.msa)


def msa(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    idx_q: Float[Array, "T Hi Di"],
    index_cache: Float[Array, "P B Di"],
    batch: Batch,
    *,
    scale: float,
    topk: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    out: Float[Array, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Array, "T Hq D"]:
    """MiniMax sparse attention: `index_score`, `select_blocks` and `sparse_attention` as one operation.

    Index head h serves the KV heads h * Hkv / Hi onwards; with more index heads than KV heads, the query
    heads of a KV group split among its index heads. Up to topk * B tokens of context the result is that of
    `dense_attention`.

    Raises:
      ValueError: for shapes, types or options that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_attention(q, k_cache, v_cache, batch, out)
    scale = checks.check_scale(scale)
    checks.check_rank("idx_q", idx_q, "[T, Hi, Di]")
    checks.check_rank("index_cache", index_cache, "[P, B, Di]")
    checks.check_float("idx_q", idx_q)
    checks.check_cache("index_cache", index_cache)
    checks.check_extent("idx_q", "T", idx_q.shape[0], q.shape[0], "in q")
    checks.check_extent("idx_q", "Di", idx_q.shape[2], index_cache.shape[2], "in index_cache")
    checks.check_extent("index_cache", "B", index_cache.shape[1], k_cache.shape[2], "in k_cache")
    kv_heads, index_heads = k_cache.shape[1], idx_q.shape[1]
    if kv_heads % index_heads and index_heads % kv_heads:
        raise ValueError(f"idx_q's Hi = {index_heads}: must divide k_cache's Hkv = {kv_heads}, or be a multiple of it")
    checks.check_multiple("q's Hq", q.shape[1], "idx_q's Hi", index_heads)
    checks.check_selection(topk, init_blocks, local_blocks)
    if 0 in (q.shape[0], batch.num_requests, batch.num_blocks):  # no token, or none that sees a key
        return jnp.zeros_like(q) if out is None else out
    return dispatch(
        "msa",
        _IMPLEMENTATIONS,
        impl,
        q,
        k_cache,
        v_cache,
        idx_q,
        index_cache,
        batch,
        scale=scale,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        out=out,
    )
