"""dense_attention over all pages of a request: prefill in tiles of 128 query rows, decode split over the pages."""

from __future__ import annotations

from jaxtyping import Array, Float

from minimax_kernels.batch import Batch, tile_size
from minimax_kernels.launch_table import AttendLaunch, dense_launch
from minimax_kernels.paged_softmax import attend_pages
from minimax_kernels.triton_support import require_pages


def dense_attention(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Array, "T Hq D"] | None,
    interpret: bool = False,
    launch: AttendLaunch | None = None,
) -> Float[Array, "T Hq D"]:
    """See `minimax_kernels.dense_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    require_pages(q, k_cache, block_size, head_dim, interpret=interpret)
    launch = launch or dense_launch(
        num_tokens,
        batch.num_blocks,
        num_heads // num_kv_heads,
        num_kv_heads,
        tile_size(num_tokens, batch.num_requests, most=128),
    )
    return attend_pages(
        q, k_cache, v_cache, batch, groups=num_kv_heads, selection=None, scale=scale, out=out, launch=launch,
        interpret=interpret,
    )  # fmt: skip
