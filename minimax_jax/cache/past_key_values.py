"""The context of a batch that its caller carries from call to call, in pages."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from minimax_jax.buckets import bucket
from minimax_jax.cache.pages import CachePlacement, PagedCaches, Place
from minimax_jax.cache.pool import PagePool
from minimax_jax.config import MiniMaxM3Config


class PastKeyValues:
    """What `model(..., past_key_values=)` reads and extends: each row's pages, in a pool that grows as it must.

    Columns are those that the calls were given, padding included; only tokens are in the pages, so that padding on
    either side changes nothing. Rows of a model with data ranks live in equal groups, one a rank.

    Attributes:
      config, dtype: of the model that it belongs to.
      pool: the pages.
      kept: [R, S] bool, which of the columns seen so far are tokens.
      block_tables: [R, N] int32 pages of each row, from its rank's part of the pool; entries not in use are 0.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        batch_size: int,
        dtype: DTypeLike,
        place: Place = None,
        *,
        max_cache_len: int = 0,
    ):
        """An empty context.

        Args:
          batch_size: R, rows.
          dtype: of the caches.
          place: a device, or how pools are spread over ranks.
          max_cache_len: tokens a row to make room for at once; more may come.

        Raises:
          ValueError: for no row, or a negative length.
        """
        if operator.index(batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        if operator.index(max_cache_len) < 0:
            raise ValueError(f"max_cache_len = {max_cache_len}: must be at least 0")
        self.config, self.dtype = config, jnp.dtype(dtype)
        self._block_size = config.index_block_size
        self._groups = place.groups if isinstance(place, CachePlacement) else 1
        self.kept: Bool[np.ndarray, "R S"] = np.zeros((batch_size, 0), bool)
        self.block_tables: Int[np.ndarray, "R N"] = np.zeros((batch_size, 1), np.int32)
        self._pages_of = np.zeros(batch_size, np.int32)
        pages = max(1, -(-max_cache_len // self._block_size))
        self.pool = PagePool(config, bucket(pages * self.rows_per_group), dtype, place)
        self.reserve(np.full(batch_size, max_cache_len))

    @property
    def batch_size(self) -> int:
        """R, rows."""
        return len(self.kept)

    @property
    def rows_per_group(self) -> int:
        """Rows of one data rank, padded to a bucket; all of them on one device."""
        return bucket(-(-self.batch_size // self._groups))

    @property
    def kv_lens(self) -> Int[np.ndarray, "R"]:
        """[R] int32 tokens of each row."""
        return self.kept.sum(axis=1, dtype=np.int32)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """S, columns seen so far; the same for every layer."""
        return self.kept.shape[1]

    def reserve(self, kv_lens: Int[np.ndarray, "R"]) -> None:
        """Gives each row the pages that `kv_lens` tokens need; the pool grows if it must."""
        needed = np.maximum(self._pages_of, -(-np.asarray(kv_lens, np.int32) // self._block_size))
        width = bucket(max(1, int(needed.max())))
        tables = np.zeros((self.batch_size, max(width, self.block_tables.shape[1])), np.int32)
        tables[:, : self.block_tables.shape[1]] = self.block_tables
        most = 0
        for first in range(0, self.batch_size, self.rows_per_group):
            group = range(first, min(first + self.rows_per_group, self.batch_size))
            free = int(self._pages_of[group].sum())
            for row in group:
                more = int(needed[row] - self._pages_of[row])
                tables[row, self._pages_of[row] : needed[row]] = np.arange(free, free + more)
                free += more
            most = max(most, free)
        if most > self.pool.num_pages:
            self.pool.resize(bucket(most))
        self.block_tables, self._pages_of = tables, needed

    def append(self, kept: Bool[np.ndarray, "R L"]) -> None:
        """Counts new columns, whose tokens a step has written to the pages."""
        self.kept = np.concatenate([self.kept, kept], axis=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns: `tokens_to_remove` is negative, as in transformers, or 0.

        Raises:
          ValueError: for a positive number, or more columns than there are.
        """
        count = -operator.index(tokens_to_remove)
        if not 0 <= count <= self.get_seq_length():
            raise ValueError(f"tokens_to_remove = {tokens_to_remove}: must be within {-self.get_seq_length()}..0")
        self.kept = self.kept[:, : self.get_seq_length() - count]

    def reset(self) -> None:
        """Forgets all columns; the pages stay for what comes next."""
        self.crop(-self.get_seq_length())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Puts `repeats` copies of each row, one after the other, in its place."""
        if operator.index(repeats) < 1:
            raise ValueError(f"repeats = {repeats}: must be at least 1")
        self.batch_select_indices(np.repeat(np.arange(self.batch_size), repeats))

    def reorder_cache(self, beam_idx: Any) -> None:
        """`batch_select_indices` by transformers' other name for as many rows as before."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Row i becomes what row indices[i] was; pages are copied, so that rows never share one.

        Raises:
          ValueError: for an index out of range, or none.
        """
        chosen = np.atleast_1d(np.asarray(indices.tolist() if hasattr(indices, "tolist") else indices))
        inside = chosen.size and chosen.dtype.kind == "i" and 0 <= chosen.min() <= chosen.max() < self.batch_size
        if not inside or chosen.ndim != 1:
            raise ValueError(f"indices = {chosen.tolist()}: must be row numbers within 0..{self.batch_size - 1}")
        rows_before, tables_before = self.rows_per_group, self.block_tables
        self._take(chosen)
        pages = self.pool.num_pages
        source = np.arange(pages * self._groups)
        for row, old in enumerate(chosen):
            count = self._pages_of[row]
            new_pages = row // self.rows_per_group * pages + self.block_tables[row, :count]
            source[new_pages] = old // rows_before * pages + tables_before[old, :count]
        with self.pool.borrow() as lent:
            lent.caches = _gather(jax.tree.map(lambda pool: pool.sharding, lent.caches))(lent.caches, source)

    def _take(self, chosen: np.ndarray) -> None:
        """Tables of the chosen rows over pages counted anew; the pool grows first if it must."""
        before = self.kept, self._pages_of, self.block_tables
        needed = self._pages_of[chosen] * self._block_size
        self.kept, self._pages_of = self.kept[chosen], np.zeros(len(chosen), np.int32)
        self.block_tables = np.zeros((len(chosen), self.block_tables.shape[1]), np.int32)
        try:
            self.reserve(needed)
        except BaseException:  # no room: the rows are as they were
            self.kept, self._pages_of, self.block_tables = before
            raise


def _gather(shardings: PagedCaches) -> Any:
    leaves, structure = jax.tree.flatten(shardings)
    return _compiled_gather(tuple(leaves), structure)


@functools.lru_cache(maxsize=16)
def _compiled_gather(leaves: tuple[Any, ...], structure: Any) -> Any:
    def gather(caches: PagedCaches, source: Int[jax.Array, "P"]) -> PagedCaches:
        return jax.tree.map(lambda pool: pool[source], caches)

    return jax.jit(gather, donate_argnums=0, out_shardings=jax.tree.unflatten(structure, leaves))
