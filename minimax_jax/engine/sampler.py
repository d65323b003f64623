"""Picks the next token of each row, on the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from minimax_jax.model import SINGLE_DEVICE, Comm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What sampling needs, as arrays, so that other values never cause a retrace.

    Attributes:
      temperature, top_p: scalars; top_k: scalar, the vocabulary size when switched off.
      keys: [R] one random key a row, of its own stream: a row's tokens do not depend on its batch mates.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    keys: Key[Array, "R"]


def sampling_state(
    seed: int, num_rows: int, temperature: float, top_p: float, top_k: int, vocab_size: int
) -> SamplingState:
    """State for `num_rows` rows; row r draws from stream r of the seed."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(num_rows))
    return SamplingState(
        jnp.float32(temperature), jnp.float32(top_p), jnp.int32(min(top_k, vocab_size) if top_k else vocab_size), keys
    )


def sampling_specs(rows: PartitionSpec) -> SamplingState:
    """How the state of a step is sharded whose rows are sharded as `rows`."""
    shared: Any = PartitionSpec()
    by_row: Any = rows
    return SamplingState(shared, shared, shared, by_row)


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
      positions: where the new token will stand; the random draw depends on (seed, row, position) alone.
      greedy: static; take the most likely token.
      truncated: static; whether top-k or top-p cut anything (sorting is skipped otherwise).
      comm: joins the ranks' parts: only the best of each if greedy, else the logits, on the device.
    """
    if greedy:
        return comm.argmax_vocab(logits)
    logits = comm.gather_vocab(logits)
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / state.temperature  # finite at the top, however cold
    if truncated:
        scaled = jnp.where(_kept(scaled, state.top_k, state.top_p), scaled, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(state.keys, positions)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def _kept(scaled: Float[Array, "R V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Array:
    """The `top_k` likeliest tokens, and of these the fewest whose probabilities reach `top_p`.

    Ties go to the lower id, so that exactly `top_k` remain. As in transformers, top-p looks at the
    distribution that top-k left.
    """
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    within_k = jnp.arange(scaled.shape[-1]) < top_k
    probabilities = jax.nn.softmax(jnp.where(within_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    likeliest = jnp.arange(scaled.shape[-1]) == 0
    # the likeliest token stays however small top_p is; rounding must cut nothing at top_p = 1
    kept_ranked = within_k & ((before < top_p) | (top_p >= 1) | likeliest)
    rows = jnp.arange(scaled.shape[0])[:, None]
    return jnp.zeros(scaled.shape, bool).at[rows, order].set(kept_ranked)
