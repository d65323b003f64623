"""Random MXFP8 weights of about the size that keeps activations as large as they are."""

from __future__ import annotations

import jax

from minimax_jax.rank_slice.weights import draw_mxfp8
from minimax_kernels import Mxfp8


def random_mxfp8(key: jax.Array, shape: tuple[int, ...]) -> Mxfp8:
    """Bytes that are no NaN, and scales of three neighbouring powers of two."""
    return draw_mxfp8(key, shape, 6.67 + 0.5 * (shape[-2].bit_length() - 1))
