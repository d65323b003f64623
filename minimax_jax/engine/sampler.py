"""Picks the next token of each row, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from minimax_jax.engine.generation_config import COLDEST
from minimax_jax.model import SINGLE_DEVICE, Comm
from minimax_kernels import sampling_cut


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
    scaled: Float[Array, "R V"], top_k: Int[Array, "R"], top_p: Float[Array, "R"], min_p: Float[Array, "R"]
) -> Bool[Array, "R V"]:
    """The `top_k` likeliest tokens at least `min_p` times as likely as the likeliest one, and of these the fewest
    whose probabilities reach `top_p`.

    Ties go to the lower id, so that exactly `top_k` remain. As in transformers, top-p looks at the
    distribution that the others left.
    """
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    value, token = (x[:, None] for x in sampling_cut(scaled, top_k, top_p, min_p))
    up_to_the_cut = (scaled > value) | ((scaled == value) & (jnp.arange(scaled.shape[-1]) <= token))
    return up_to_the_cut & (scaled >= jnp.log(min_p)[:, None])
