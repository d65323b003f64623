"""The likeliest tokens of each row, in order, without sorting the vocabulary.

A row is cut into blocks of 128 tokens. The `count` likeliest tokens lie in the `count` blocks with the largest
maxima: a token elsewhere has a better one in each of these. So maxima are sorted, a 128th of the row, and then the
tokens of the chosen blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 128


def likeliest(values: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """As `jax.lax.top_k`: (values in falling order, their ids), of equal values the lower id first.

    Args:
      count: K, at most V.
    """
    vocab_size = values.shape[1]
    num_blocks = -(-vocab_size // _BLOCK)
    if num_blocks <= 2 * count:  # most blocks would be chosen
        best, ids = jax.lax.top_k(values, count)
        return best, ids.astype(jnp.int32)
    padded = jnp.pad(values, ((0, 0), (0, num_blocks * _BLOCK - vocab_size)), constant_values=-jnp.inf)
    blocks = padded.reshape(-1, num_blocks, _BLOCK)
    _, chosen = jax.lax.top_k(blocks.max(axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal values the lower id stays first
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=1).reshape(-1, count * _BLOCK)
    best, places = jax.lax.top_k(candidates, count)
    ids = jnp.take_along_axis(chosen, places // _BLOCK, axis=1) * _BLOCK + places % _BLOCK
    return best, ids.astype(jnp.int32)
