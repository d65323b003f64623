"""Picks the next token of each row, on the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from minimax_jax.engine.generation_config import COLDEST
from minimax_jax.model import SINGLE_DEVICE, Comm


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


def sampling_state(
    seed: int, num_rows: int, temperature: float, top_p: float, top_k: int, vocab_size: int
) -> SamplingState:
    """State for `num_rows` rows that all sample alike; row r draws from stream r of the seed."""

    def rows(value: float, dtype: Any) -> Array:
        return jnp.full(num_rows, value, dtype)

    most = min(top_k, vocab_size) if top_k else vocab_size
    return SamplingState(
        rows(temperature, jnp.float32),
        rows(top_p, jnp.float32),
        rows(0, jnp.float32),
        rows(most, jnp.int32),
        jnp.asarray(np.full(num_rows, seed, np.uint32)),
        jnp.arange(num_rows, dtype=jnp.uint32),
    )


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
      truncated: static; whether top-k, top-p or min-p cut anything (sorting is skipped otherwise).
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
    top_k: Int[Array, "#R"],
    top_p: Float[Array, "#R"],
    min_p: Float[Array, "#R"] | None = None,
) -> Array:
    """The `top_k` likeliest tokens at least `min_p` times as likely as the likeliest one, and of these the fewest
    whose probabilities reach `top_p`.

    Ties go to the lower id, so that exactly `top_k` remain. As in transformers, top-p looks at the
    distribution that the others left.
    """
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    within = jnp.arange(scaled.shape[-1]) < top_k[..., None]
    if min_p is not None:
        within &= ranked - ranked[:, :1] >= jnp.log(min_p)[..., None]
    probabilities = jax.nn.softmax(jnp.where(within, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    likeliest = jnp.arange(scaled.shape[-1]) == 0
    # the likeliest token stays however small top_p is; rounding must cut nothing at top_p = 1
    kept_ranked = within & ((before < top_p[..., None]) | (top_p[..., None] >= 1) | likeliest)
    rows = jnp.arange(scaled.shape[0])[:, None]
    return jnp.zeros(scaled.shape, bool).at[rows, order].set(kept_ranked)
