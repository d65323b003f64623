"""Page pools for keys, values and index keys, and who holds which page."""

from minimax_jax.cache.cache_dtype import CACHE_DTYPES, cache_dtype, check_cache_dtype
from minimax_jax.cache.page_allocator import PageAllocator
from minimax_jax.cache.pages import CachePlacement, PagedCaches, allocate_pages
from minimax_jax.cache.past_key_values import PastKeyValues
from minimax_jax.cache.pool import LentCaches, LentLayer, PagePool
from minimax_jax.cache.sequence_pages import SequencePages

__all__ = [
    "CACHE_DTYPES",
    "CachePlacement",
    "LentCaches",
    "LentLayer",
    "PageAllocator",
    "PagePool",
    "PagedCaches",
    "PastKeyValues",
    "SequencePages",
    "allocate_pages",
    "cache_dtype",
    "check_cache_dtype",
]
