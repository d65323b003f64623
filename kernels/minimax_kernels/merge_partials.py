"""Joins attention results over disjoint sets of keys into one softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minimax_kernels.launch_table import MERGE_LAUNCH, MERGE_ROWS
from minimax_kernels.triton_call import ceil_div, next_power_of_two, triton_call


def merge_last_program(result, lse, refs, place, splits: int, write, *, interpret: bool) -> None:
    """Device side: stores a program's partial result; the last program of a tile merges all and writes.

    Args:
      result: [rows, D] float32, normalised.
      lse: [rows] base-2 logarithm of the sum of exponentials.
      refs: (counters [tiles, S], partial [tiles, S, splits, rows, D], lse [tiles, S, splits, rows]).
      place: (tile, group, split) of this program.
      splits: programs a tile.
      write: what to do with the merged [rows, D].
    """
    counters_ref, partial_ref, lse_ref = refs
    tile, group, split = place
    rows, head_dim = result.shape
    partial_ref[tile, group, split] = result
    lse_ref[tile, group, split] = lse
    if interpret:  # programs run one after another there, and its atomics take no scalar index
        arrived = counters_ref[tile, group]
        counters_ref[tile, group] = arrived + 1
    else:
        # all of this program's stores come before the count that announces them (the atomic releases and acquires)
        plgpu.debug_barrier()
        arrived = plgpu.atomic_add(counters_ref, (tile, group), 1)

    @pl.when(arrived == splits - 1)
    def _merge():
        if not interpret:
            plgpu.debug_barrier()
        all_lse = [lse_ref[tile, group, part] for part in range(splits)]
        top = functools.reduce(jnp.maximum, all_lse)
        top = jnp.where(top == -jnp.inf, 0.0, top)
        merged, total = jnp.zeros((rows, head_dim), jnp.float32), jnp.zeros((rows,), jnp.float32)
        for part in range(splits):  # unrolled, so that the loads of several parts are under way together
            weight = jnp.exp2(all_lse[part] - top)
            total += weight
            merged += partial_ref[tile, group, part] * weight[:, None]
        write(merged * (1.0 / jnp.where(total == 0, 1.0, total))[:, None])


def merge_partials(
    partial: Float[Array, "T S J G D"],
    top: Float[Array, "T S J G"],
    total: Float[Array, "T S J G"],
    selected: Int[Array, "S T J"] | None,
    query_starts: Int[Array, "R+1"],
    *,
    out: Float[Array, "T S*G D"] | None,
    dtype: DTypeLike,
    interpret: bool,
    first_token: int = 0,
) -> Float[Array, "T S*G D"]:
    """The sum of J partial results times 2 ** top, divided by the sum of their totals times 2 ** top.

    Args:
      partial: values weighed by 2 ** (score - top), over one part of the keys each, for S groups of G query heads.
      top: what each part's scores were reduced by; -inf for a part without keys.
      total: the sum of each part's weights (1 where `partial` was divided by it and `top` is its logarithm).
      selected: parts with a negative entry were never written and are not read; None if all were.
      query_starts: rows from its last entry on are padding: zeros, or left alone where `out` is given.
      out: buffer that the result is written into.
      dtype: of the result, if there is no `out`.
      first_token: flat row of partial's first token, when partial is a chunk of them.
    """
    num_tokens, groups, parts, rows, head_dim = partial.shape
    step = min(MERGE_ROWS, rows)
    kernel = functools.partial(
        _merge_kernel, parts=parts, rows=rows, step=step, fresh=out is None, has_selected=selected is not None,
        first_token=first_token,
    )  # fmt: skip
    args = [partial, top, total, query_starts]
    if selected is not None:
        args.append(selected)
    aliases = None
    shape: tuple[int, ...] = (num_tokens, groups * rows, head_dim)
    if out is not None:
        aliases = {len(args): 0}
        args.append(out)
        shape, dtype = out.shape, out.dtype
    return triton_call(
        kernel,
        args,
        jax.ShapeDtypeStruct(shape, dtype),
        grid=(num_tokens, groups, ceil_div(rows, step)),
        launch=MERGE_LAUNCH,
        name="merge_partials",
        interpret=interpret,
        aliases=aliases,
    )


def _merge_kernel(
    partial_ref, top_ref, total_ref, starts_ref, *refs, parts, rows, step, fresh, has_selected, first_token
):
    out_ref = refs[-1]
    token, group = pl.program_id(0), pl.program_id(1)
    width, lanes, head_dim = next_power_of_two(parts), next_power_of_two(step), partial_ref.shape[4]
    part = jnp.arange(width, dtype=jnp.int32)
    row = pl.program_id(2) * step + jnp.arange(lanes, dtype=jnp.int32)
    row_inside = row < rows
    channel = jnp.arange(head_dim, dtype=jnp.int32)
    is_live = token + first_token < starts_ref[starts_ref.shape[0] - 1]
    written = (part < parts) & is_live
    part_at = jnp.minimum(part, parts - 1)
    row_at = jnp.minimum(row, rows - 1)
    if has_selected:
        written &= refs[0][group, token + first_token, part_at] >= 0

    def read(ref, other):
        at = ref.at[token, group, part_at[:, None], row_at[None, :]]
        return plgpu.load(at, mask=jnp.broadcast_to(written[:, None], (width, lanes)), other=other)

    tops, totals = read(top_ref, -jnp.inf), read(total_ref, 0.0)
    top = jnp.max(tops, axis=0)
    weights = jnp.exp2(tops - jnp.where(top == -jnp.inf, 0.0, top)[None, :])
    total = jnp.sum(weights * totals, axis=0)
    weights = weights / jnp.where(total == 0, 1.0, total)[None, :]
    values = plgpu.load(
        partial_ref.at[token, group, part_at[:, None, None], row_at[None, :, None], channel[None, None, :]],
        mask=jnp.broadcast_to(written[:, None, None], (width, lanes, head_dim)),
        other=0.0,
    )
    result = jnp.sum(values.astype(jnp.float32) * weights[:, :, None], axis=0)
    writes = row_inside if fresh else row_inside & is_live
    num_rows = out_ref.shape[0]
    to_row = jnp.where(writes, token + first_token, num_rows)
    plgpu.store(
        out_ref.at[to_row[:, None], (group * rows + row_at)[:, None], channel[None, :]],
        result.astype(out_ref.dtype),
        mask=jnp.broadcast_to(writes[:, None], (lanes, head_dim)),
    )
