"""Log probabilities of tokens and of the likeliest ones beside them, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_jax.engine.likeliest import likeliest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Of one token a row.

    Attributes:
      own: its log probability.
      ranks: its place among all tokens, from 1 on.
      top_ids, top: the likeliest tokens, best first.
    """

    own: Float[Array, "R"]
    ranks: Int[Array, "R"]
    top_ids: Int[Array, "R K"]
    top: Float[Array, "R K"]


def token_logprobs(logits: Float[Array, "R V"], tokens: Int[Array, "R"], most: int) -> TokenLogprobs:
    """Of `tokens` under softmax(logits), with the `most` likeliest ones."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logs, tokens[:, None], axis=-1)
    ranks = jnp.sum(logs > own, axis=-1) + 1
    top, top_ids = likeliest(logs, most)
    return TokenLogprobs(own[:, 0], ranks.astype(jnp.int32), top_ids, top)
