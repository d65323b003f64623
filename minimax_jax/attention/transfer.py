"""Small host arrays to the device in one transfer: each transfer of its own costs the host as much as a kernel."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int


def send_together(arrays: Sequence[Int[np.ndarray, "..."]], *, exact: bool = False) -> list[Int[Array, "..."]]:
    """int32 arrays on JAX's default device; what takes them apart is compiled once for each combination of shapes.

    Args:
      exact: whether the shapes may be endlessly many: nothing is compiled then, each array travels by itself.
    """
    if exact:
        return jax.device_put(list(arrays))
    return _apart(np.concatenate([array.reshape(-1) for array in arrays]), tuple(array.shape for array in arrays))


@functools.partial(jax.jit, static_argnums=1)
def _apart(packed: Int[Array, "S"], shapes: tuple[tuple[int, ...], ...]) -> list[Int[Array, "..."]]:
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    return [packed[end - math.prod(shape) : end].reshape(shape) for shape, end in zip(shapes, ends, strict=True)]
