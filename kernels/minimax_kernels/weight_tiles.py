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

from minimax_kernels.mxfp8 import BLOCK, Mxfp8, interleaved_inputs
from minimax_kernels.mxfp8_tile import dequantize_tile

Weight = Float[Array, "*E K N"] | Mxfp8


@dataclasses.dataclass(frozen=True)
class WeightTiles:
    """References to a weight [K, N] or a stack of them [E, K, N], inside a kernel.

    Attributes:
      refs: (matrix,), or an Mxfp8's (values, scales), which have their columns first.
      lead: which of a stack, a scalar; None for one matrix.
      columns_first: whether a matrix without scales is [N, K], too.
    """

    refs: tuple[Any, ...]
    lead: jax.Array | None = None
    columns_first: bool = False

    @property
    def quantized(self) -> bool:
        """Whether there are scales."""
        return len(self.refs) > 1

    @property
    def in_features(self) -> int:
        """K."""
        return self.refs[0].shape[-1 if self.quantized or self.columns_first else -2]

    def _load(self, ref: Any, first: jax.Array, size: int, columns: jax.Array) -> jax.Array:
        inputs = first + jnp.arange(size, dtype=jnp.int32)
        if self.quantized or self.columns_first:
            at = (columns[:, None], inputs[None, :])
        else:
            at = (inputs[:, None], columns[None, :])
        return ref[at] if self.lead is None else ref[(self.lead, *at)]

    def values(self, k: jax.Array, size: int, columns: jax.Array) -> jax.Array:
        """[size, columns] of inputs k on, or [columns, size], as they are stored."""
        return self._load(self.refs[0], k, size, columns)

    def scales(self, k: jax.Array, size: int, columns: jax.Array) -> jax.Array:
        """[columns, size / 32] of inputs k on."""
        return self._load(self.refs[1], lax.div(k, BLOCK), size // BLOCK, columns)


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
    its: Bool[Array, "n"] | None = None,
) -> None:
    """Writes the rows that are `live`, in the type of the array [T, N].

    Args:
      lead: where in a stack of such arrays.
      its: which columns to write, None for all.
    """
    to = (jnp.where(live, row, out_ref.shape[-2])[:, None], columns[None, :])  # out of range where nothing is written
    mask = jnp.broadcast_to(live[:, None], result.shape)
    if its is not None:
        mask &= its[None, :]
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
    rows_first: bool = False,
    interpret: bool,
) -> jax.Array:
    """float32 [num_rows, len(columns)] products with these columns, over a range of inputs.

    An MXFP8 weight is the first operand of the matrix instructions, which may come from registers: what has become
    bfloat16 there goes through no other memory on its way to the matrix units, and rows may be as few as 8.

    Args:
      rows_at: k -> [num_rows, block_k], the rows' inputs from k on.
      block_k: inputs of a step; of an MXFP8 weight a multiple of `interleaved_inputs`.
      begin, stop: the range, in steps of block_k inputs.
    """

    def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
        if interpret:  # its dot takes no mixed types, and the CPU's has bfloat16 sums
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    def values(i: jax.Array) -> jax.Array:
        return weight.values(i * block_k, block_k, columns)

    if not weight.quantized:

        def add_product(i: jax.Array, total: jax.Array) -> jax.Array:
            return total + product(rows_at(i * block_k), values(i), (1, 1 if weight.columns_first else 0))

        return lax.fori_loop(begin, stop, add_product, jnp.zeros((num_rows, columns.shape[0]), jnp.float32))

    last = weight.in_features // block_k - 1

    def scales(i: jax.Array) -> jax.Array:
        return weight.scales(jnp.minimum(i, last) * block_k, block_k, columns)

    def add_dequantized(i: jax.Array, carry: Any) -> Any:
        total, scale = carry
        tile = values(i)
        # a few bytes a thread, which asynchronous copies do not take: loaded a step ahead
        following = scales(i + 1)
        w = dequantize_tile(tile, scale, interleaved=interleaved_inputs(weight.in_features), interpret=interpret)
        x = rows_at(i * block_k)
        return total + (product(x, w, (1, 1)) if rows_first else product(w, x, (1, 1))), following

    shape = (num_rows, columns.shape[0]) if rows_first else (columns.shape[0], num_rows)
    total, _ = lax.fori_loop(begin, stop, add_dequantized, (jnp.zeros(shape, jnp.float32), scales(jnp.int32(begin))))
    return total if rows_first else total.T
