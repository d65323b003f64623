"""Page pools for keys, values and index keys."""

from minimax_jax.cache.pages import CachePlacement, PagedCaches, allocate_pages
from minimax_jax.cache.past_key_values import PastKeyValues
from minimax_jax.cache.pool import LentCaches, LentLayer, PagePool

__all__ = ["CachePlacement", "LentCaches", "LentLayer", "PagePool", "PagedCaches", "PastKeyValues", "allocate_pages"]
