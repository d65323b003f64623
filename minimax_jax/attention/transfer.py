"""Small host arrays to the device in one transfer: each transfer of its own costs the host as much as a kernel."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int


def send_together(arrays: Sequence[Int[np.ndarray, "..."]]) -> list[Int[Array, "..."]]:
    """int32 arrays on JAX's default device; compiled once for each combination of shapes."""
    return _apart(np.concatenate([array.reshape(-1) for array in arrays]), tuple(array.shape for array in arrays))


@functools.partial(jax.jit, static_argnums=1)
def _apart(packed: Int[Array, "S"], shapes: tuple[tuple[int, ...], ...]) -> list[Int[Array, "..."]]:
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    return [packed[end - math.prod(shape) : end].reshape(shape) for shape, end in zip(shapes, ends, strict=True)]
