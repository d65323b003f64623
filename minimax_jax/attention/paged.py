"""One layer's attention once its keys and values lie in pages."""

from __future__ import annotations

from jaxtyping import Array, Float

from minimax_jax.config import MiniMaxM3Config
from minimax_kernels import Batch, dense_attention, msa


def attend_paged(
    config: MiniMaxM3Config,
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    idx_q: Float[Array, "T Hi Di"] | None,
    index_cache: Float[Array, "P B Di"] | None,
    batch: Batch,
    *,
    out: Float[Array, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Array, "T Hq*D"]:
    """Block-sparse attention where there is an index branch, dense attention where there is none.

    Args:
      out: buffer for the result; rows without a token keep what they hold.
    """
    scale = config.head_dim**-0.5
    if idx_q is None or index_cache is None:
        attended = dense_attention(q, k_cache, v_cache, batch, scale=scale, out=out, impl=impl)
    else:
        attended = msa(
            q,
            k_cache,
            v_cache,
            idx_q,
            index_cache,
            batch,
            scale=scale,
            topk=config.index_topk_blocks,
            init_blocks=config.index_init_blocks,
            local_blocks=config.index_local_blocks,
            out=out,
            impl=impl,
        )
    return attended.reshape(q.shape[0], -1)
