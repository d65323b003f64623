"""Picks the next token of each row, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from minimax_jax.engine.generation_config import COLDEST
from minimax_jax.engine.likeliest import likeliest
from minimax_jax.model import SINGLE_DEVICE, Comm

_CANDIDATES = 128  # tokens among which cuts are looked for before a vocabulary is sorted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What sampling needs of each row, as arrays, so that other values never cause a retrace.

    Attributes:
      temperature: below 1e-30 a row is greedy.
      top_p, min_p: 1 and 0 where they are switched off.
      top_k: the vocabulary size where it is switched off.
      seeds, streams: a row draws from stream `streams` of `seeds`: its tokens do not depend on its batch mates.
    """

    temperature: Float[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    top_k: Int[Array, "R"]
    seeds: UInt32[Array, "R"]
    streams: UInt32[Array, "R"]

    @property
    def keys(self) -> Key[Array, "R"]:
        """One random key a row."""
        return jax.vmap(lambda seed, stream: jax.random.fold_in(jax.random.key(seed), stream))(self.seeds, self.streams)


def pick_tokens(
    logits: Float[Array, "R V"],
    positions: Int[Array, "R"],
    state: SamplingState,
    *,
    greedy: bool,
    truncated: bool,
    comm: Comm = SINGLE_DEVICE,
) -> Int[Array, "R"]:
    """The next token of each row.

    Args:
      logits: of the last position, float32, of this rank's part of the vocabulary.
      positions: where the new token will stand; the random draw depends on (seed, stream, position) alone.
      greedy: static; whether all rows take the most likely token.
      truncated: static; whether top-k, top-p or min-p cut anything.
      comm: joins the ranks' parts: only the best of each if greedy, else the logits, on the device.
    """
    if greedy:
        return comm.argmax_vocab(logits)
    logits = comm.gather_vocab(logits)
    cold = state.temperature < COLDEST
    temperature = jnp.where(cold, 1, state.temperature)[:, None]
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # finite at the top, however cold
    if truncated:
        scaled = jnp.where(_kept(scaled, state.top_k, state.top_p, state.min_p), scaled, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(state.keys, positions)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return jnp.where(cold, jnp.argmax(logits, axis=-1).astype(jnp.int32), drawn)


def _kept(
    scaled: Float[Array, "R V"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
    min_p: Float[Array, "R"],
    *,
    candidates: int = _CANDIDATES,
) -> Array:
    """The `top_k` likeliest tokens at least `min_p` times as likely as the likeliest one, and of these the fewest
    whose probabilities reach `top_p`.

    Ties go to the lower id, so that exactly `top_k` remain. As in transformers, top-p looks at the
    distribution that the others left.

    Args:
      candidates: likeliest tokens to look at first. Only where some row's cut does not lie among them, the whole
        vocabulary is sorted.
    """
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    vocab_size = scaled.shape[-1]
    likely = scaled >= jnp.log(min_p)[:, None]
    if candidates >= vocab_size:
        ranked, ids = jax.lax.top_k(scaled, vocab_size)
        return likely & _up_to_the_cut(scaled, ranked, ids, top_k, top_p, likely)[0]
    ranked, ids = likeliest(scaled, candidates)
    kept, found = _up_to_the_cut(scaled, ranked, ids, top_k, top_p, likely)
    uncut = (top_k >= vocab_size) & (top_p >= 1)

    def sort_all() -> Array:
        return _up_to_the_cut(scaled, *jax.lax.top_k(scaled, vocab_size), top_k, top_p, likely)[0]

    return likely & jax.lax.cond((found | uncut).all(), lambda: kept | uncut[:, None], sort_all)


def _up_to_the_cut(
    scaled: Float[Array, "R V"],
    ranked: Float[Array, "R C"],
    ids: Int[Array, "R C"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
    likely: Bool[Array, "R V"],
) -> tuple[Bool[Array, "R V"], Bool[Array, "R"]]:
    """(which tokens come up to the cut of top-k and top-p, whether the cut is among the ranked ones).

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
    up_to = (scaled > value) | ((scaled == value) & (jnp.arange(scaled.shape[-1]) <= token))
    reached = (last[:, 0] < num_ranked - 1) & (top_k >= scaled.shape[-1])
    return up_to, (top_k <= num_ranked) | reached
