"""Log probabilities of tokens and of the likeliest ones beside them, on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels import likeliest


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


def empty_logprobs(shape: tuple[int, ...], most: int) -> TokenLogprobs:
    """Room for what is said about `shape` tokens, with the `most` likeliest ones beside each."""
    single, several = jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, most), jnp.float32)
    return TokenLogprobs(single, single.astype(jnp.int32), several.astype(jnp.int32), several)


def token_logprobs(logits: Float[Array, "R V"], tokens: Int[Array, "R"], most: int) -> TokenLogprobs:
    """Of `tokens` under softmax(logits), with the `most` likeliest ones."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logs, tokens[:, None], axis=-1)
    ranks = jnp.sum(logs > own, axis=-1) + 1
    top, top_ids = likeliest(logs, most)
    return TokenLogprobs(own[:, 0], ranks.astype(jnp.int32), top_ids, top)


def by_token(scores: TokenLogprobs, most: int) -> list[TokenLogprobs]:
    """Of some tokens in a row, on the host: each token's own, as Python numbers.

    Args:
      most: likeliest tokens that were asked for; steps find as many as any row wants, loops as many as may be wanted.
    """
    numbers = (scores.own, scores.ranks, scores.top_ids[:, :most], scores.top[:, :most])
    return [TokenLogprobs(*each) for each in zip(*(x.tolist() for x in numbers), strict=True)]
