"""Sampling parameters for tests that pick without an engine."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minimax_jax.engine.sampler import SamplingState


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
