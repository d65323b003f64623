"""The names that users give the types of caches."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_kernels import FP8

CACHE_DTYPES = ("auto", "bfloat16", "float32", "fp8")


def check_cache_dtype(name: str, argument: str = "cache_dtype") -> str:
    """Raises ValueError, which names the argument, for a name that is not in CACHE_DTYPES."""
    if name not in CACHE_DTYPES:
        *others, last = map(repr, CACHE_DTYPES)
        raise ValueError(f"{argument} = {name!r}: must be {', '.join(others)} or {last}")
    return name


def cache_dtype(name: str, weights: DTypeLike) -> np.dtype:
    """The type of the caches that a name asks for: "auto" is the weights', "fp8" e4m3 (`minimax_kernels.write_kv`).

    Raises:
      ValueError: for another name.
    """
    check_cache_dtype(name)
    return jnp.dtype({"auto": weights, "fp8": FP8}.get(name, name))
