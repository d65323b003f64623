"""The likeliest tokens of each row, in order, without sorting the vocabulary.

A row is cut into blocks of 128 tokens. The `count` likeliest tokens lie in the `count` blocks with the largest
maxima: a token elsewhere has a better one in each of these. So maxima are sorted, a 128th of the row, and then the
tokens of the chosen blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128


def in_blocks(values: Float[Array, "R V"]) -> Float[Array, "R blocks 128"]:
    """Rows cut into blocks; what is past the last value is -inf."""
    num_rows, vocab_size = values.shape
    padded = jnp.pad(values, ((0, 0), (0, -vocab_size % BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(num_rows, -(-vocab_size // BLOCK), BLOCK)


def likeliest(values: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """As `jax.lax.top_k`: (values in falling order, their ids), of equal values the lower id first.

    Args:
      count: K, at most V.
    """
    if values.shape[1] <= 2 * count * BLOCK:  # most blocks would be chosen
        best, ids = jax.lax.top_k(values, count)
        return best, ids.astype(jnp.int32)
    blocks = in_blocks(values)
    _, chosen = jax.lax.top_k(blocks.max(axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal values the lower id stays first
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=1).reshape(-1, count * BLOCK)
    best, places = jax.lax.top_k(candidates, count)
    ids = jnp.take_along_axis(chosen, places // BLOCK, axis=1) * BLOCK + places % BLOCK
    return best, ids.astype(jnp.int32)
