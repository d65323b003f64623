"""The cut of top-k and top-p in plain jnp, by sorting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minimax_kernels.likeliest import likeliest


def sampling_cut(
    scaled: Float[Array, "R V"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
    min_p: Float[Array, "R"],
    *,
    candidates: int,
) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
    """See `minimax_kernels.sampling_cut`. Only where some row's cut is not among the candidates, all are sorted."""
    vocab_size = scaled.shape[1]
    likely = scaled >= jnp.log(min_p)[:, None]

    def sort_all() -> tuple[Float[Array, "R"], Int[Array, "R"]]:
        ranked, ids = jax.lax.top_k(scaled, vocab_size)
        return _last_kept(scaled, ranked, ids.astype(jnp.int32), top_k, top_p, likely)[:2]

    if candidates >= vocab_size:
        return sort_all()
    value, token, found = _last_kept(scaled, *likeliest(scaled, candidates), top_k, top_p, likely)
    uncut = (top_k >= vocab_size) & (top_p >= 1)
    value, token = jnp.where(uncut, -jnp.inf, value), jnp.where(uncut, vocab_size - 1, token)
    found = found | uncut

    def sort_others() -> tuple[Float[Array, "R"], Int[Array, "R"]]:
        """Only for rows that need it: sums of another order would round otherwise, and depend on other rows."""
        value_of_all, token_of_all = sort_all()
        return jnp.where(found, value, value_of_all), jnp.where(found, token, token_of_all)

    return jax.lax.cond(found.all(), lambda: (value, token), sort_others)


def _last_kept(
    scaled: Float[Array, "R V"],
    ranked: Float[Array, "R C"],
    ids: Int[Array, "R C"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
    likely: Bool[Array, "R V"],
) -> tuple[Float[Array, "R"], Int[Array, "R"], Bool[Array, "R"]]:
    """(value and id of the last token that is kept, whether it is among the ranked ones).

    Args:
      ranked, ids: the C likeliest tokens, in order.
      likely: what min-p leaves.
    """
    rank, num_ranked = jnp.arange(ranked.shape[-1]), ranked.shape[-1]
    weights = jnp.where(jnp.take_along_axis(likely, ids, axis=-1), jnp.exp(ranked), 0)
    within = rank < top_k[:, None]
    by_rank = jnp.where(within, weights, 0)
    # where top-k goes beyond what is ranked it must cut nothing, or the cut is not found
    total = jnp.where(top_k <= num_ranked, by_rank.sum(axis=-1), jnp.where(likely, jnp.exp(scaled), 0).sum(axis=-1))
    before = (jnp.cumsum(by_rank, axis=-1) - by_rank) / total[:, None]
    # the likeliest token stays however small top_p is; rounding must cut nothing at top_p = 1
    kept = within & ((before < top_p[:, None]) | (top_p >= 1)[:, None] | (rank == 0))
    last = kept.sum(axis=-1, keepdims=True) - 1
    value, token = jnp.take_along_axis(ranked, last, axis=-1), jnp.take_along_axis(ids, last, axis=-1)
    reached = (last[:, 0] < num_ranked - 1) & (top_k >= scaled.shape[-1])
    return value[:, 0], token[:, 0], (top_k <= num_ranked) | reached
