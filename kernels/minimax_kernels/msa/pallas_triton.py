"""The whole of MiniMax sparse attention as a chain of Pallas kernels."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_kernels.batch import Batch, tile_size
from minimax_kernels.cache_types import is_fp8
from minimax_kernels.index_score.pallas_triton import index_score, score_and_clear
from minimax_kernels.launch_table import MOST_RANKED_BLOCKS, attend_launch
from minimax_kernels.paged_softmax import Selection, attend_pages
from minimax_kernels.select_blocks.pallas_triton import select_blocks
from minimax_kernels.sparse_attention.pallas_triton import FEW_QUERIES, sparse_attention
from minimax_kernels.triton_call import ceil_div
from minimax_kernels.triton_support import require_pages


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
    """See `minimax_kernels.msa`.

    Few queries a request: two launches (score; select and attend) up to 128 blocks a request, three beyond
    (score, select, attend). Many: score, select, and attention page by page.
    """
    num_tokens, index_heads = idx_q.shape[:2]
    num_kv_heads = k_cache.shape[1]
    groups = max(num_kv_heads, index_heads)
    shared_by = groups // index_heads  # groups that one index head serves
    require_pages(q, k_cache, k_cache.shape[2], q.shape[2], interpret=interpret)
    options: dict[str, Any] = {"topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}
    if tile_size(num_tokens, batch.num_requests) > FEW_QUERIES:
        scores = index_score(idx_q, index_cache, batch, interpret=interpret)
        selected = select_blocks(scores, batch, **options, interpret=interpret)
        selected = jnp.repeat(selected, shared_by, axis=0) if shared_by > 1 else selected
        return sparse_attention(q, k_cache, v_cache, selected, batch, scale=scale, out=out, interpret=interpret)
    launch = attend_launch(num_tokens, groups, topk, q.shape[1] // groups, fp8=is_fp8(k_cache.dtype))
    is_split = ceil_div(topk, launch.blocks_per_program) > 1
    scores, *counters = score_and_clear(idx_q, index_cache, batch, groups if is_split else 0, interpret=interpret)
    if batch.num_blocks <= MOST_RANKED_BLOCKS:
        selection = Selection(scores=scores, **options)
    else:
        selected = select_blocks(scores, batch, **options, interpret=interpret)
        selection = Selection(topk, blocks=jnp.repeat(selected, shared_by, axis=0) if shared_by > 1 else selected)
    return attend_pages(
        q, k_cache, v_cache, batch, groups=groups, selection=selection, scale=scale, out=out, launch=launch,
        interpret=interpret, counters=counters[0] if counters else None,
    )  # fmt: skip
