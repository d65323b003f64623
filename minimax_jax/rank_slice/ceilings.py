"""What a device does at best: copy bandwidth and matmul rate, measured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Of one device, see `measure_ceilings`."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float


def measure_ceilings(copy_bytes: int = 4 << 30, matmul_size: int = 8192) -> Ceilings:
    """Copy bandwidth (bytes read and written) and bf16 matmul rate of this device, on random data."""
    key = jax.random.key(1, impl="rbg")
    words = jax.random.bits(key, (copy_bytes // 8, 2), jnp.uint32)
    copies = [jax.jit(lambda x: jnp.copy(x)), jax.jit(lambda x: x ^ 1)]  # whichever is faster
    copy = min(_plain_time(function, words) for function in copies)
    del words
    a, b = (jax.random.normal(k, (matmul_size, matmul_size), jnp.bfloat16) for k in jax.random.split(key))
    matmul = _plain_time(jax.jit(jnp.matmul), a, b)
    return Ceilings(2 * (copy_bytes // 8 * 8) / copy, 2 * matmul_size**3 / matmul)


def _plain_time(function: Callable[..., Any], *args: jax.Array, calls: int = 20) -> float:
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        result.block_until_ready()
        seconds.append((time.perf_counter() - begin) / calls)
    return statistics.median(seconds)
