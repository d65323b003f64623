"""Device side: products of a tile of rows with columns of a weight, whatever form the weight has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

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

    def _load(self, ref: Any, row: jax.Array, rows: int, columns: jax.Array) -> jax.Array:
        at = ((row + jnp.arange(rows, dtype=jnp.int32))[:, None], columns[None, :])
        return ref[at] if self.lead is None else ref[(self.lead, *at)]

    def values(self, k: jax.Array, size: int, columns: jax.Array) -> jax.Array:
        """[size, len(columns)] of rows k on, as they are stored."""
        return self._load(self.refs[0], k, size, columns)

    def scales(self, k: jax.Array, size: int, columns: jax.Array) -> tuple[jax.Array, ...]:
        """Of rows k on; empty for a weight without."""
        if len(self.refs) == 1:
            return ()
        return (self._load(self.refs[1], lax.div(k, BLOCK), size // BLOCK, columns),)


def weight_refs(weight: Weight) -> tuple[jax.Array, ...]:
    """A weight's arrays, as a kernel takes them."""
    return (weight.values, weight.scales) if isinstance(weight, Mxfp8) else (weight,)


def store_rows(
    out_ref: Any,
    row: Int[Array, "m"],
    live: Bool[Array, "m"],
    columns: Int[Array, "n"],
    result: Float[Array, "m n"],
    lead: tuple[jax.Array, ...] = (),
) -> None:
    """Writes the rows that are `live`, in the type of the array [T, N]; `lead`: where in a stack of such."""
    to = (jnp.where(live, row, out_ref.shape[-2])[:, None], columns[None, :])  # out of range where nothing is written
    mask = jnp.broadcast_to(live[:, None], result.shape)
    plgpu.store(out_ref.at[(*lead, *to)], result.astype(out_ref.dtype), mask=mask)


def multiply_tile(
    rows_at: Callable[[jax.Array], jax.Array],
    weight: WeightTiles,
    columns: jax.Array,
    *,
    num_rows: int,
    block_k: int,
    begin: jax.Array | int,
    stop: jax.Array | int,
    ahead: bool,
    interpret: bool,
) -> jax.Array:
    """float32 [num_rows, len(columns)] products with these columns, over a range of inputs.

    Args:
      rows_at: k -> [num_rows, block_k], the rows' inputs from k on.
      begin, stop: the range, in steps of block_k inputs.
      ahead: a step multiplies the tile that the step before has made bfloat16, whose bytes the one before that has
        loaded into registers: two steps' work at a time, less shared memory, more registers.
    """
    last = weight.in_features // block_k - 1

    def scales(i: jax.Array) -> tuple[jax.Array, ...]:
        return weight.scales(jnp.minimum(i, last) * block_k, block_k, columns)

    def values(i: jax.Array) -> jax.Array:
        return weight.values(i * block_k, block_k, columns)

    def whole(tile: jax.Array, scale: tuple[jax.Array, ...]) -> jax.Array:
        return dequantize_tile(tile, *scale, interpret=interpret) if scale else tile

    def add_product(total: jax.Array, i: jax.Array, w: jax.Array) -> jax.Array:
        x = rows_at(i * block_k)
        if interpret:  # its dot takes no mixed types, and the CPU's has bfloat16 sums
            x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        return total + lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def step(i: jax.Array, carry: Any) -> Any:
        total, scale = carry
        # a few bytes a thread, which asynchronous copies do not take: loaded a step ahead
        following = scales(i + 1)
        return add_product(total, i, whole(values(i), scale)), following

    def step_ahead(i: jax.Array, carry: Any) -> Any:
        total, w, tile, scale = carry
        following = values(jnp.minimum(i + 2, last)), scales(i + 2)
        return add_product(total, i, w), whole(tile, scale), *following

    total, first = jnp.zeros((num_rows, columns.shape[0]), jnp.float32), jnp.int32(begin)
    if not ahead:
        return lax.fori_loop(begin, stop, step, (total, scales(first)))[0]
    second = jnp.minimum(first + 1, last)
    start = total, whole(values(first), scales(first)), values(second), scales(second)
    return lax.fori_loop(begin, stop, step_ahead, start)[0]
