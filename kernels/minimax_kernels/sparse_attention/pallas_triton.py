"""sparse_attention: page by page where pages are shared by many queries, token by token elsewhere."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels.batch import Batch, tile_size
from minimax_kernels.cache_types import is_fp8
from minimax_kernels.launch_table import PageLaunch, attend_launch, page_launch
from minimax_kernels.paged_softmax import Selection, attend_pages
from minimax_kernels.sparse_attention.by_page import attend_by_page
from minimax_kernels.triton_call import ceil_div, is_power_of_two
from minimax_kernels.triton_support import require_pages

FEW_QUERIES = 16  # queries a request, or
FEW_PROGRAMS = 1024  # tokens x groups in all, up to which each token reads its own pages


def sparse_attention(
    q: Float[Array, "T Hq D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    selected: Int[Array, "S T topk"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Array, "T Hq D"] | None,
    interpret: bool = False,
    by_page: bool | None = None,
    page_options: PageLaunch | None = None,
) -> Float[Array, "T Hq D"]:
    """See `minimax_kernels.sparse_attention`; `by_page` picks one of the two kernels, None the faster by size."""
    num_tokens, num_heads, head_dim = q.shape
    groups, _, topk = selected.shape
    require_pages(q, k_cache, k_cache.shape[2], head_dim, interpret=interpret)
    rows_per_token = num_heads // groups
    queries = tile_size(num_tokens, batch.num_requests)
    if by_page is None:
        by_page = queries > FEW_QUERIES and num_tokens * groups > FEW_PROGRAMS
    launch = page_options or page_launch(num_tokens, rows_per_token, groups, topk)
    keys = ceil_div(num_tokens, launch.window) * groups * batch.num_requests * batch.num_blocks
    if by_page and keys < 2**31 - 1 and rows_per_token <= 64 and is_power_of_two(rows_per_token):
        return attend_by_page(
            q, k_cache, v_cache, selected, batch, scale=scale, out=out, launch=launch, interpret=interpret
        )
    attend = attend_launch(
        num_tokens, groups, topk, rows_per_token, prefill=queries > FEW_QUERIES, fp8=is_fp8(k_cache.dtype)
    )
    return attend_pages(
        q, k_cache, v_cache, batch, groups=groups, selection=Selection(topk, blocks=selected), scale=scale, out=out,
        launch=attend, interpret=interpret,
    )  # fmt: skip
