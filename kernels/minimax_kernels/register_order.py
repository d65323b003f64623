"""Device side: bytes in the order in which the registers of matrix instructions hold an operand."""

from __future__ import annotations

from jaxtyping import Array, Shaped


def register_order(x: Shaped[Array, "N K"], stretch: int) -> Shaped[Array, "N K"]:
    """`x` with the inputs of each stretch of K permuted, so that a thread reads its own from memory side by side.

    Of 16 inputs that an instruction multiplies at once, a thread holds two pairs, 8 apart, of a row. Read one after
    another, pairs of bytes are one load each. So the k-th quarter of a stretch becomes the pairs of the k-th of four
    threads, and is read in loads of up to 16 bytes. A product over K is the same if both operands are permuted.

    Args:
      stretch: divides K, a multiple of 16.
    """
    rows, inputs = x.shape
    pairs = x.reshape(rows, inputs // stretch, 4, stretch // 8, 2)
    return pairs.transpose(0, 1, 3, 2, 4).reshape(rows, inputs)
