"""One layer's attention over pages: what is written to them, and what is read."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel import IndexSplit
from minimax_kernels import Batch, dense_attention, msa, sparse_attention, write_kv, write_kv_index


def attend_paged(
    config: MiniMaxM3Config,
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    idx_q: Float[Array, "T Hi Di"] | None,
    index_cache: Float[Array, "P Bi Di"] | None,
    batch: Batch,
    *,
    index_split: IndexSplit | None = None,
    out: Float[Array, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Array, "T Hq*D"]:
    """Block-sparse attention where there is an index branch, dense attention where there is none.

    Args:
      index_cache: of B keys a page, or with `index_split` this rank's share of them.
      index_split: what shares out the index keys; None where every rank has them all.
      out: buffer for the result; rows without a token keep what they hold.
    """
    scale = config.head_dim**-0.5
    if idx_q is None or index_cache is None:
        attended = dense_attention(q, k_cache, v_cache, batch, scale=scale, out=out, impl=impl)
        return attended.reshape(q.shape[0], -1)
    options: dict[str, Any] = {
        "topk": config.index_topk_blocks,
        "init_blocks": config.index_init_blocks,
        "local_blocks": config.index_local_blocks,
    }
    if index_split is None:
        attended = msa(
            q, k_cache, v_cache, idx_q, index_cache, batch, scale=scale, **options, out=out, impl=impl
        )  # fmt: skip
    else:
        selected = index_split.select(idx_q, index_cache, batch, **options, impl=impl)
        selected = jnp.repeat(selected, max(1, k_cache.shape[1] // idx_q.shape[1]), axis=0)  # for each KV head
        attended = sparse_attention(q, k_cache, v_cache, selected, batch, scale=scale, out=out, impl=impl)
    return attended.reshape(q.shape[0], -1)


def write_paged(
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    index_cache: Float[Array, "P Bi Di"] | None,
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    idx_k: Float[Array, "T 1 Di"] | None,
    slots: Int[Array, "T"],
    *,
    index_split: IndexSplit | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"], Float[Array, "P Bi Di"] | None]:
    """One layer's new tokens in their pages, in place; of index keys, with `index_split`, only this rank's."""
    if index_cache is not None and idx_k is not None and index_split is None:
        return write_kv_index(k_cache, v_cache, index_cache, k, v, idx_k, slots, impl=impl)
    k_cache, v_cache = write_kv(k_cache, v_cache, k, v, slots, impl=impl)
    if index_cache is not None and idx_k is not None and index_split is not None:
        index_cache = index_split.write(index_cache, idx_k, slots, impl=impl)
    return k_cache, v_cache, index_cache
