"""Requests with one token each in plain jnp: all rows together, a few of their keys at a time.

The references go through tiles of query rows one by one, which bounds their memory. Where each tile is one token, as in
decoding, a tile is little work, and what it costs is the way there and back. So here rows run together, over as many
keys of each as stay in a CPU's caches, and only as far as the longest of them goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minimax_kernels.cache_types import as_read

_ELEMENTS = 1 << 20  # of gathered keys in one product; four times as many took longer than row after row
_CHUNK_ELEMENTS = 1 << 18  # of keys that all rows together gather at once
_LEAST_KEYS = 32  # of a row at once
NOWHERE = jnp.iinfo(jnp.int32).max  # the position of a page that a row does not have


class _Softmax(NamedTuple):
    """Softmax over some of a row's keys, not yet divided by its total."""

    top: Float[Array, "T S G 1"]
    total: Float[Array, "T S G 1"]
    weighted: Float[Array, "T S G D"]


def attend_single_rows(
    q: Float[Array, "T S G D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    pages: Int[Array, "T S M"],
    starts: Int[Array, "T S M"],
    positions: Int[Array, "T"],
    *,
    scale: float,
) -> Float[Array, "T S G D"]:
    """Softmax attention of each token over M pages of its own in float32; a row that sees nothing gives zeros.

    Args:
      q: G query heads for each of S selections, which share KV heads evenly.
      starts: the position of each page's first key, `NOWHERE` for a page that is none.
      positions: of the tokens, which see the keys up to their own. What a token does not see may be NaN.
    """
    block_size = k_cache.shape[2]
    piece, at_once = _chunks(q, pages.shape[2], block_size)
    attend = functools.partial(_attend_chunks, scale=scale, piece=piece, at_once=at_once)
    if at_once * piece >= pages.shape[2] * block_size:
        return attend(q, k_cache, v_cache, pages, starts, positions)
    # a loop of as many turns as there is work cannot be differentiated backwards: all pages together can
    whole = functools.partial(_attend_chunks, scale=scale, piece=block_size, at_once=pages.shape[2])
    call = jax.custom_jvp(attend)
    call.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
    return call(q, k_cache, v_cache, pages, starts, positions)


def _chunks(q: Float[Array, "T S G D"], num_pages: int, block_size: int) -> tuple[int, int]:
    """(keys of a piece of a page, pieces to gather at once)."""
    keys = max(_LEAST_KEYS, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * q.shape[3]))
    piece = block_size
    while piece > keys and piece % 2 == 0:
        piece //= 2
    return piece, max(1, min(keys // piece, num_pages * block_size // piece))


def _attend_chunks(
    q: Float[Array, "T S G D"],
    k_cache: Float[Array, "P Hkv B D"],
    v_cache: Float[Array, "P Hkv B D"],
    pages: Int[Array, "T S M"],
    starts: Int[Array, "T S M"],
    positions: Int[Array, "T"],
    *,
    scale: float,
    piece: int,
    at_once: int,
) -> Float[Array, "T S G D"]:
    """Pages are cut into pieces of `piece` keys, of which `at_once` of a row are gathered and attended to together."""
    num_rows, num_selections, num_pages = pages.shape
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    parts = block_size // piece
    num_chunks = -(-num_pages * parts // at_once)
    part = jnp.arange(parts, dtype=jnp.int32)
    kv_head = (jnp.arange(num_selections, dtype=jnp.int32) * num_kv_heads // num_selections)[:, None]

    def by_chunk(values: Int[Array, "T S M"], step: int, padding: int) -> Int[Array, "T S chunks at_once"]:
        pieces = (values[..., None] + part * step).reshape(num_rows, num_selections, -1)
        missing = num_chunks * at_once - pieces.shape[2]
        pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, missing)), constant_values=padding)
        return pieces.reshape(num_rows, num_selections, num_chunks, at_once)

    ids = by_chunk((pages * num_kv_heads + kv_head) * parts, 1, 0)
    first = by_chunk(jnp.minimum(starts, NOWHERE - block_size), piece, NOWHERE - block_size)
    keys, values = (cache.reshape(-1, piece, head_dim) for cache in (k_cache, v_cache))

    def chunk(number: Array | int) -> _Softmax:
        own, at = ids[:, :, number], first[:, :, number]
        visible = at[..., None] + jnp.arange(piece) <= positions[:, None, None, None]
        return _softmax(q, keys[own], values[own], visible, scale)

    if num_chunks == 1:
        result = chunk(0)
    else:
        live = (first <= positions[:, None, None, None]).any(axis=(0, 1, 3))
        last = jnp.max(jnp.where(live, jnp.arange(1, num_chunks + 1), 0))
        least = jnp.full((*q.shape[:3], 1), jnp.finfo(jnp.float32).min)
        nothing = _Softmax(least, jnp.zeros_like(least), jnp.zeros(q.shape, jnp.float32))
        result = jax.lax.fori_loop(0, last, lambda number, so_far: _joined(so_far, chunk(number)), nothing)
    return result.weighted / jnp.where(result.total == 0, 1.0, result.total)


def _softmax(
    q: Float[Array, "T S G D"],
    keys: Float[Array, "T S n b D"],
    values: Float[Array, "T S n b D"],
    visible: Bool[Array, "T S n b"],
    scale: float,
) -> _Softmax:
    """Of n pieces of b keys a row and selection."""
    exact = jax.lax.Precision.HIGHEST
    values = jnp.where(visible[..., None], values, 0).astype(jnp.float32)
    by_row = (*q.shape[:2], -1)
    keys, values = (x.reshape(*by_row, q.shape[3]) for x in (as_read(keys, q.dtype), values))
    # keys first: they stay as they were gathered, while a right operand would be turned
    scores = jnp.einsum("tskd,tsgd->tskg", keys, q, precision=exact, preferred_element_type=jnp.float32)
    mask = visible.reshape(*by_row)[..., None]
    scores = jnp.where(mask, scores * scale, -jnp.inf).swapaxes(2, 3)
    mask = mask.swapaxes(2, 3)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=3, keepdims=True), jnp.finfo(jnp.float32).min))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    weighted = jnp.einsum("tsgk,tskd->tsgd", weights, values, precision=exact, preferred_element_type=jnp.float32)
    return _Softmax(top, weights.sum(axis=3, keepdims=True), weighted)


def _joined(one: _Softmax, other: _Softmax) -> _Softmax:
    """Over the keys of both."""
    top = jnp.maximum(one.top, other.top)
    fade_one, fade_other = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return _Softmax(
        top,
        one.total * fade_one + other.total * fade_other,
        one.weighted * fade_one + other.weighted * fade_other,
    )


def map_rows(fn: Callable[[Any], Array], rows: Any, num_elements: int) -> Array:
    """`fn` of each row (axis 0 of all arrays in `rows`), of which several run together.

    Args:
      num_elements: that a row gathers.
    """
    num_rows, at_once = jax.tree.leaves(rows)[0].shape[0], _ELEMENTS // num_elements
    if at_once >= num_rows:
        return jax.vmap(fn)(rows)
    return jax.lax.map(fn, rows, batch_size=at_once if at_once > 1 else None)
