"""Device side: products of a tile of rows with columns of a weight, whatever form the weight has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from minimax_kernels.mxfp8 import BLOCK, Mxfp8
from minimax_kernels.mxfp8_tile import dequantize_tile

Weight = Float[Array, "*E K N"] | Mxfp8


@dataclasses.dataclass(frozen=True)
class WeightTiles:
    """References to a weight [K, N] or a stack of them [E, K, N], inside a kernel.

    Attributes:
      refs: (matrix,) or an Mxfp8's (values, scales).
      lead: which of a stack, a scalar; None for one matrix.
    """

    refs: tuple[Any, ...]
    lead: jax.Array | None = None

    @property
    def in_features(self) -> int:
        """K."""
        return self.refs[0].shape[-2]

    def _load(self, ref: Any, row: jax.Array, rows: int, column: jax.Array, columns: int) -> jax.Array:
        at = (pl.ds(row, rows), pl.ds(column, columns))
        return ref[at] if self.lead is None else ref[(self.lead, *at)]

    def values(self, k: jax.Array, size: int, column: jax.Array, columns: int) -> jax.Array:
        """Rows k on, as they are stored."""
        return self._load(self.refs[0], k, size, column, columns)

    def scales(self, k: jax.Array, size: int, column: jax.Array, columns: int) -> tuple[jax.Array, ...]:
        """Of rows k on; empty for a weight without."""
        if len(self.refs) == 1:
            return ()
        return (self._load(self.refs[1], lax.div(k, BLOCK), size // BLOCK, column, columns),)


def weight_refs(weight: Weight) -> tuple[jax.Array, ...]:
    """A weight's arrays, as a kernel takes them."""
    return (weight.values, weight.scales) if isinstance(weight, Mxfp8) else (weight,)


def multiply_tile(
    rows_at: Callable[[jax.Array], jax.Array],
    weight: WeightTiles,
    columns: tuple[jax.Array, ...],
    *,
    num_rows: int,
    block_n: int,
    block_k: int,
    begin: jax.Array | int,
    stop: jax.Array | int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """float32 [num_rows, block_n] products with the columns from each of `columns` on, over a range of inputs.

    Args:
      rows_at: k -> [num_rows, block_k], the rows' inputs from k on.
      begin, stop: the range, in steps of block_k inputs.
    """

    def scales(step: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
        k = jnp.minimum(step, weight.in_features // block_k - 1) * block_k
        return tuple(weight.scales(k, block_k, column, block_n) for column in columns)

    def step(i: jax.Array, carry: Any) -> Any:
        sums, current = carry
        # a few bytes a thread, which asynchronous copies do not take: loaded a step ahead
        following = scales(i + 1)
        x = rows_at(i * block_k)
        added = []
        for column, total, scale in zip(columns, sums, current, strict=True):
            w = weight.values(i * block_k, block_k, column, block_n)
            if scale:
                w = dequantize_tile(w, scale[0], interpret=interpret)
            if interpret:  # its dot takes no mixed types, and the CPU's has bfloat16 sums
                x, w = x.astype(jnp.float32), w.astype(jnp.float32)
            product = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            added.append(total + product)
        return tuple(added), following

    zeros = tuple(jnp.zeros((num_rows, block_n), jnp.float32) for _ in columns)
    sums, _ = lax.fori_loop(begin, stop, step, (zeros, scales(jnp.int32(begin))))
    return sums
