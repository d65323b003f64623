"""Page pools for keys, values and index keys."""

from minimax_jax.cache.pages import PagedCaches, allocate_pages

__all__ = ["PagedCaches", "allocate_pages"]
