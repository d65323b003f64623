"""Device side: which request a tile of flat rows belongs to, found inside a kernel from `Batch.query_starts`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from minimax_kernels.triton_call import is_power_of_two, next_power_of_two


class Tile(NamedTuple):
    """Rows of one request, all scalars.

    Attributes:
      request: the request, num_requests for padding rows, and for tiles past the last.
      first_row: flat row of the tile's first token.
      num_rows: tokens in the tile; 0 past the last tile.
      first_position: position of the first token in its request; meaningless for padding.
    """

    request: jax.Array
    first_row: jax.Array
    num_rows: jax.Array
    first_position: jax.Array


def num_tiles(num_tokens: int, num_requests: int, tile: int) -> int:
    """A static bound of the tiles that T rows make; the padding rows count as one request more."""
    return num_tokens if tile == 1 else num_tokens // tile + min(num_requests + 1, num_tokens)


def locate_tile(
    starts_ref: Any, kv_lens_ref: Any, tile_id: jax.Array, *, tile: int, num_tokens: int, num_requests: int
) -> Tile:
    """Finds tile `tile_id` when each request's rows, then the padding rows, are cut into tiles of `tile` rows.

    Every request starts a tile of its own. One vector load of the starts and a prefix sum: no table made
    beforehand, hence no launch before the kernel.
    """
    assert is_power_of_two(tile), tile
    shift = tile.bit_length() - 1
    if tile == 1 and num_requests == 1:  # nothing to search
        request = (tile_id >= starts_ref[1]).astype(jnp.int32)
        return Tile(request, tile_id, jnp.int32(1), kv_lens_ref[0] - starts_ref[1] + tile_id)
    if tile == 1 and num_tokens == num_requests:  # decode: row r is mostly that of request r
        begin, end = starts_ref[tile_id], starts_ref[tile_id + 1]
        likely = tile_id, kv_lens_ref[tile_id] - end + tile_id  # loaded beside them, not after them
        is_likely = (begin == tile_id) & (end == tile_id + 1)
        request, position = lax.cond(
            is_likely, lambda: likely, lambda: _search_row(starts_ref, kv_lens_ref, tile_id, num_requests, num_tokens)
        )
        return Tile(request, tile_id, jnp.int32(1), position)
    if tile == 1:  # the tile is the row: what depends on the row alone need not wait for the search
        request, position = _search_row(starts_ref, kv_lens_ref, tile_id, num_requests, num_tokens)
        return Tile(request, tile_id, jnp.int32(1), position)
    begins, ends, ids = _bounds(starts_ref, num_requests, num_tokens)
    tiles_of = lax.shift_right_arithmetic(ends - begins + (tile - 1), shift)
    tile_ends = jnp.cumsum(tiles_of, dtype=jnp.int32)
    before = tile_ends <= tile_id
    request = jnp.minimum(jnp.sum(before, dtype=jnp.int32), num_requests)
    offset = (tile_id - jnp.sum(jnp.where(before & (ids <= num_requests), tiles_of, 0), dtype=jnp.int32)) * tile
    begin = starts_ref[request]
    end = jnp.where(request < num_requests, starts_ref[jnp.minimum(request + 1, num_requests)], num_tokens)
    count = jnp.clip(end - begin - offset, 0, tile)
    past = kv_lens_ref[jnp.minimum(request, num_requests - 1)] - (end - begin)
    return Tile(request, begin + offset, count, past + offset)


def _bounds(starts_ref: Any, num_requests: int, num_tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(first rows, rows past the last, ids) of the requests and of the padding rows, padded to a power of two."""
    ids = jnp.arange(next_power_of_two(num_requests + 1), dtype=jnp.int32)
    begins = starts_ref[jnp.minimum(ids, num_requests)]
    ends = starts_ref[jnp.minimum(ids + 1, num_requests)]
    return begins, jnp.where(ids == num_requests, num_tokens, ends), ids


def _search_row(
    starts_ref: Any, kv_lens_ref: Any, row: jax.Array, num_requests: int, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """(request, position) of a row."""
    _, ends, _ = _bounds(starts_ref, num_requests, num_tokens)
    request = jnp.minimum(jnp.sum(ends <= row, dtype=jnp.int32), num_requests)
    known = jnp.minimum(request, num_requests - 1)
    return request, kv_lens_ref[known] - starts_ref[known + 1] + row
