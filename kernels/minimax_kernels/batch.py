"""Which request each flat token belongs to, and which pages hold that request's context."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A ragged batch of requests over paged caches.

    Attributes:
      block_tables: [R, N] int32, the page of each logical block of a request; entries past a request's
        context are never read as data and may hold anything.
      query_starts: [R + 1] int32, request r owns the flat rows query_starts[r] .. query_starts[r + 1] - 1;
        rows from query_starts[R] on are padding.
      kv_lens: [R] int32, tokens of context, the new ones included.
    """

    block_tables: Int[Array, "R N"]
    query_starts: Int[Array, "R+1"]
    kv_lens: Int[Array, "R"]

    @property
    def num_requests(self) -> int:
        """R, requests without new tokens included."""
        return self.kv_lens.shape[0]

    @property
    def num_blocks(self) -> int:
        """N, the width of the block tables."""
        return self.block_tables.shape[1]


class QueryTiles(NamedTuple):
    """A ragged batch cut into tiles of rows of one request each.

    Attributes:
      request: [tiles] the request of each tile (tiles past the last hold any valid request).
      rows: [tiles, TQ] flat row of each tile row; `num_tokens` where there is none.
      positions: [tiles, TQ] position of the row's token in its request; -1 where there is none.
    """

    request: Int[Array, "tiles"]
    rows: Int[Array, "tiles TQ"]
    positions: Int[Array, "tiles TQ"]


def query_tiles(batch: Batch, num_tokens: int, tile: int) -> QueryTiles:
    """Cuts the live rows of a batch into tiles of at most `tile` rows; the number of tiles is static."""
    num_requests = batch.num_requests
    query_lens = batch.query_starts[1:] - batch.query_starts[:-1]
    tiles_of = (query_lens + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles_of)
    # every request adds at most one partial tile
    num_tiles = num_tokens if tile == 1 else num_tokens // tile + min(num_requests, num_tokens)
    ids = jnp.arange(num_tiles, dtype=jnp.int32)
    request = jnp.minimum(jnp.searchsorted(tile_ends, ids, side="right"), num_requests - 1).astype(jnp.int32)
    first = (ids - (tile_ends - tiles_of)[request]) * tile
    offsets = first[:, None] + jnp.arange(tile, dtype=jnp.int32)
    live = (offsets < query_lens[request][:, None]) & (ids < tile_ends[-1])[:, None]
    rows = jnp.where(live, batch.query_starts[request][:, None] + offsets, num_tokens)
    past = (batch.kv_lens - query_lens)[request][:, None]
    return QueryTiles(request, rows, jnp.where(live, past + offsets, -1))


def tile_size(num_tokens: int, num_requests: int, most: int = 64) -> int:
    """A power-of-two tile that suits the mean query length: 1 for pure decode."""
    mean = -(-num_tokens // max(num_requests, 1))
    return min(most, 1 << (mean - 1).bit_length())


def packed_batch(query_starts: Int[Array, "R+1"], num_tokens: int, block_size: int, max_len: int):
    """Gives R cacheless sequences a page layout of their own, so that paged operations serve them too.

    Args:
      query_starts: [R + 1] int32 boundaries of the sequences in the flat rows.
      num_tokens: T, rows in all.
      block_size: tokens a page.
      max_len: static bound of one sequence's length.

    Returns:
      (batch, slots [T] int32 with -1 on padding rows, number of pages).
    """
    num_requests = query_starts.shape[0] - 1
    lens = (query_starts[1:] - query_starts[:-1]).astype(jnp.int32)
    pages_of = (lens + block_size - 1) // block_size
    first_page = jnp.cumsum(pages_of) - pages_of
    num_pages = num_tokens // block_size + num_requests
    width = -(-max_len // block_size)
    tables = jnp.minimum(first_page[:, None] + jnp.arange(width, dtype=jnp.int32), num_pages - 1)
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    request = jnp.minimum(jnp.searchsorted(query_starts[1:], rows, side="right"), num_requests - 1)
    slots = first_page[request] * block_size + rows - query_starts[request]
    slots = jnp.where(rows < query_starts[-1], slots, -1).astype(jnp.int32)
    return Batch(tables.astype(jnp.int32), query_starts.astype(jnp.int32), lens), slots, num_pages


def scatter_rows(base: Array, rows: Int[Array, "tiles TQ"], values: Array) -> Array:
    """Writes tile results [tiles, TQ, ...] to their flat rows of `base`; rows out of range are dropped."""
    flat = values.reshape(-1, *values.shape[2:]).astype(base.dtype)
    return base.at[rows.reshape(-1)].set(flat, mode="drop", unique_indices=False)
