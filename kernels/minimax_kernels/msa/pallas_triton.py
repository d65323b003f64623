"""The whole of MiniMax sparse attention as a chain of Pallas kernels."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels.batch import Batch
from minimax_kernels.index_score import pallas_triton as index_score
from minimax_kernels.select_blocks import pallas_triton as select_blocks
from minimax_kernels.sparse_attention import pallas_triton as sparse_attention


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
    init_blocks: int,
    local_blocks: int,
    out: Float[Array, "T Hq D"] | None,
    interpret: bool = False,
) -> Float[Array, "T Hq D"]:
    """See `minimax_kernels.msa`."""
    scores = index_score.index_score(idx_q, index_cache, batch, interpret=interpret)
    selected = select_blocks.select_blocks(
        scores, batch, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks, interpret=interpret
    )
    shared_by = max(k_cache.shape[1] // idx_q.shape[1], 1)  # KV heads that one index head serves
    selected = jnp.repeat(selected, shared_by, axis=0) if shared_by > 1 else selected
    return sparse_attention.sparse_attention(
        q, k_cache, v_cache, selected, batch, scale=scale, out=out, interpret=interpret
    )
