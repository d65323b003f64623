"""The kernel that scatters new rows into pages, in place; several caches in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.cache_types import as_stored
from minimax_kernels.launch_table import WRITE_LAUNCH, WRITE_TOKENS
from minimax_kernels.triton_call import ceil_div, is_power_of_two, next_power_of_two, triton_call
from minimax_kernels.triton_support import require_offsets


def write_pages(
    caches: Sequence[Float[Array, "P H B D"]],
    rows: Sequence[Float[Array, "T H D"]],
    slots: Int[Array, "T"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "P H B D"], ...]:
    """Writes row t of each array to slot t (page * B + offset) of its cache; negative slots are skipped.

    Heads and channels of the caches may differ.
    The caches are aliased to the results: nothing is copied when the caller donates them.
    """
    num_tokens, num_heads = rows[0].shape[0], max(new.shape[1] for new in rows)
    for cache in caches:
        block_size, head_dim = cache.shape[2:]
        if not is_power_of_two(head_dim) or not is_power_of_two(block_size):
            raise NotImplementedError(f"pallas_triton: pages of [{block_size}, {head_dim}] are not powers of two")
    for cache in caches:
        require_offsets("a cache", cache, interpret=interpret)
    if num_tokens == 0:
        return tuple(caches)
    count = len(caches)
    step = min(WRITE_TOKENS, next_power_of_two(num_tokens))
    return triton_call(
        functools.partial(_write_kernel, count=count, num_tokens=num_tokens, step=step),
        [*caches, *rows, slots],
        tuple(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches),
        grid=(ceil_div(num_tokens, step), num_heads),
        launch=WRITE_LAUNCH,
        name="write_pages",
        interpret=interpret,
        aliases={i: i for i in range(count)},
    )


def _write_kernel(*refs, count, num_tokens, step):
    row_refs, slots_ref, out_refs = refs[count : 2 * count], refs[2 * count], refs[2 * count + 1 :]
    token = pl.program_id(0) * step + jnp.arange(step, dtype=jnp.int32)
    head = pl.program_id(1)
    inside = token < num_tokens
    token = jnp.minimum(token, num_tokens - 1)
    slot = plgpu.load(slots_ref.at[token], mask=inside, other=-1)
    for row_ref, out_ref in zip(row_refs, out_refs, strict=True):
        num_pages, num_heads, block_size, head_dim = out_ref.shape
        channel = jnp.arange(head_dim, dtype=jnp.int32)
        writes = (slot >= 0) & (slot < num_pages * block_size) & (head < num_heads)
        own_head = jnp.minimum(head, num_heads - 1)
        page = jnp.where(writes, lax.shift_right_logical(slot, block_size.bit_length() - 1), num_pages)
        rows = row_ref[token[:, None], own_head, channel[None, :]]
        plgpu.store(
            out_ref.at[page[:, None], own_head, (slot & (block_size - 1))[:, None], channel[None, :]],
            as_stored(rows, out_ref.dtype),
            mask=jnp.broadcast_to(writes[:, None], (step, head_dim)),
        )
