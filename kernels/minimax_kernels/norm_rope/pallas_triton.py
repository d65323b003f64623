"""norm_rope: all heads of all arrays in one launch; XLA takes two an array, for the mean square and for the rest."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from minimax_kernels.head_tile import head_tile, norm_and_turn
from minimax_kernels.launch_table import NORM_LAUNCH, norm_rows
from minimax_kernels.triton_call import ceil_div, triton_call

MOST_CHANNELS = 1024  # of a head that one program's registers hold
JOINED_TOKENS = 256


def norm_rope(
    xs: tuple[Float[Array, "T H D"], ...],
    weights: tuple[Float[Array, "D"], ...],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "T H D"], ...]:
    """See `minimax_kernels.norm_rope`."""
    for i, x in enumerate(xs):
        if x.shape[2] > MOST_CHANNELS:
            raise NotImplementedError(f"pallas_triton: xs[{i}] has D = {x.shape[2]} of at most {MOST_CHANNELS}")
    num_tokens = cos.shape[0]
    if num_tokens == 0:
        return tuple(xs)
    step = norm_rows(sum(num_tokens * x.shape[1] for x in xs))
    programs = [ceil_div(num_tokens * x.shape[1], step) for x in xs]
    # few rows: what XLA has yet to add up or to cut out for each array becomes one kernel of its own, not one an array
    joined = num_tokens <= JOINED_TOKENS and len({(x.shape[2], x.dtype) for x in xs}) == 1
    first_heads = [sum(x.shape[1] for x in xs[:i]) if joined else 0 for i in range(len(xs))]
    return triton_call(
        functools.partial(_norm_rope_kernel, programs=programs, first_heads=first_heads, step=step, eps=eps),
        [*([jnp.concatenate(xs, axis=1)] if joined else xs), *weights, cos, sin],
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs),
        grid=(sum(programs),),
        launch=NORM_LAUNCH,
        name="norm_rope",
        interpret=interpret,
    )


def _norm_rope_kernel(*refs: Any, programs: list[int], first_heads: list[int], step: int, eps: float) -> None:
    """Each array has programs of its own, one after the other; a program does `step` heads."""
    count, program = len(programs), pl.program_id(0)
    x_refs, (*weight_refs, cos_ref, sin_ref), out_refs = (
        refs[: -2 * count - 2], refs[-2 * count - 2 : -count], refs[-count:]
    )  # fmt: skip
    x_refs = x_refs * (count // len(x_refs))  # one that all are joined in, or one each
    first = 0
    for i, own in enumerate(programs):
        rows = functools.partial(
            _rows, x_refs[i], weight_refs[i], cos_ref, sin_ref, out_refs[i],
            first_head=first_heads[i], step=step, eps=eps,
        )  # fmt: skip
        pl.when((program >= first) & (program < first + own))(functools.partial(rows, program - first))
        first += own


def _rows(
    x_ref: Any, weight_ref: Any, cos_ref: Any, sin_ref: Any, out_ref: Any, block: Any, *,
    first_head: int, step: int, eps: float,
) -> None:  # fmt: skip
    tile = head_tile(out_ref, block, step)

    def load(channel: jax.Array) -> jax.Array:
        at = x_ref.at[tile.token[:, None], (first_head + tile.head)[:, None], channel[None, :]]
        return plgpu.load(at, mask=tile.inside, other=0.0).astype(jnp.float32)

    tile.store(norm_and_turn(tile, load, weight_ref, cos_ref, sin_ref, eps=eps))
