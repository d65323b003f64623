"""Index keys dealt out by position: rank r of n keeps those of positions r, r + n, r + 2n, ... of every request.

What a rank keeps is an ordinary paged cache again: the same pages, of B / n keys each, in which the key of position p
stands at p // n. So page numbers, block tables and kernels stay as they are, and ranks have the same work at every
length of context, to within one key. What differs is who sees what: a token at position p sees the rank's keys up to
(p - r) // n, a place that moves on every n tokens. Tokens whose positions have the same remainder by n do see one key
more each, like the tokens of one request; they are made one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from minimax_kernels import Batch


class StripedBatch(NamedTuple):
    """The tokens of a batch as one rank's keys are seen by them.

    Attributes:
      batch: requests over the rank's keys; tables name the same pages.
      positions: [T] of each row of `batch` in its whole context, -1 on padding.
      order: [T] the flat token that stands in each row of `batch`; None where they stand as they did.
    """

    batch: Batch
    positions: Int[Array, "T"]
    order: Int[Array, "T"] | None


def striped_slots(
    slots: Int[Array, "T"], rank: Int[Array, ""] | int, num_ranks: int, block_size: int
) -> Int[Array, "T"]:
    """Where new keys go in one rank's cache.

    Args:
      slots: page * B + offset, -1 for none.
      block_size: B, tokens of a whole page.

    Returns:
      page * (B / n) + offset // n for the rank's keys, -1 for others'.
    """
    pages, offsets = slots // block_size, slots % block_size
    own = (slots >= 0) & (offsets % num_ranks == rank)
    return jnp.where(own, pages * (block_size // num_ranks) + offsets // num_ranks, -1)


def striped_batch(batch: Batch, num_tokens: int, rank: Int[Array, ""] | int, num_ranks: int) -> StripedBatch:
    """A batch over one rank's keys, exact for every token.

    A request becomes n requests, one for each remainder. Where there are few tokens (decode) each becomes one of its
    own, and none changes its place.
    """
    num_requests = batch.num_requests
    rows, num_live = jnp.arange(num_tokens, dtype=jnp.int32), batch.query_starts[-1]
    live = rows < num_live
    request = jnp.searchsorted(batch.query_starts[1:], rows, side="right")
    request = jnp.minimum(request, num_requests - 1).astype(jnp.int32)
    positions = jnp.where(live, batch.kv_lens[request] - batch.query_starts[request + 1] + rows, -1)
    if num_tokens <= num_requests * num_ranks:
        starts = jnp.minimum(jnp.arange(num_tokens + 1, dtype=jnp.int32), num_live)
        seen = jnp.where(live, _seen(positions, rank, num_ranks), 0)
        return StripedBatch(Batch(batch.block_tables[request], starts, seen), positions, None)
    piece = jnp.where(live, request * num_ranks + positions % num_ranks, num_requests * num_ranks)
    order = jnp.argsort(piece, stable=True)
    ids = jnp.arange(num_requests * num_ranks + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(piece[order], ids).astype(jnp.int32)
    newest = batch.kv_lens[:, None] - 1
    newest -= (newest - jnp.arange(num_ranks, dtype=jnp.int32)) % num_ranks  # of each remainder
    seen = jnp.maximum(_seen(newest, rank, num_ranks), 0).reshape(-1)  # pieces without tokens may have none before 0
    tables = jnp.repeat(batch.block_tables, num_ranks, axis=0)
    return StripedBatch(Batch(tables, starts, seen), positions[order], order)


def _seen(positions: Int[Array, "..."], rank: Int[Array, ""] | int, num_ranks: int) -> Int[Array, "..."]:
    """How many of the rank's keys a token sees."""
    return (positions - rank) // num_ranks + 1
