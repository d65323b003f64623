"""The order of an operand in the registers of matrix instructions, and back; for JAX and NumPy, also in kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

AnyArray = Any  # of JAX or NumPy


def register_order(x: AnyArray, stretch: int) -> AnyArray:
    """[..., K] with the inputs of each stretch of K permuted, so that a thread reads its own from memory side by side.

    Of 16 inputs that an instruction multiplies at once, a thread holds two pairs, 8 apart, of a row. Read one after
    another, pairs of bytes are one load each. So the k-th quarter of a stretch becomes the pairs of the k-th of four
    threads, and is read in loads of up to 16 bytes. A product over K is the same if both operands are permuted.

    Args:
      stretch: divides K, a multiple of 16.
    """
    return _swapped(x, stretch, (4, stretch // 8, 2))


def memory_order(x: AnyArray, stretch: int) -> AnyArray:
    """The inverse of `register_order`."""
    return _swapped(x, stretch, (stretch // 8, 4, 2))


def _swapped(values: AnyArray, stretch: int, axes: tuple[int, int, int]) -> AnyArray:
    if isinstance(values, np.ndarray) and values.itemsize == 1:  # two that stay together at a time: three times as fast
        pairs = np.ascontiguousarray(values).view(np.uint16)
        parts = pairs.reshape(*values.shape[:-1], values.shape[-1] // stretch, *axes[:2])
        return parts.swapaxes(-1, -2).reshape(pairs.shape).view(values.dtype)
    parts = values.reshape(*values.shape[:-1], values.shape[-1] // stretch, *axes)
    return parts.swapaxes(-2, -3).reshape(values.shape)
