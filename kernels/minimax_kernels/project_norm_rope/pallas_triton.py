"""Few rows in two launches: the product, and one that adds up its splits, normalises and turns.

Alone, the sum of the splits, joining the results and `norm_rope` are a launch each, which with few rows take longer to
start than to run. Many rows are `matmul` and `norm_rope`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from minimax_kernels.head_tile import head_tile, norm_and_turn
from minimax_kernels.matmul.pallas_triton import left_to_xla, matmul, partial_products
from minimax_kernels.norm_rope.pallas_triton import MOST_CHANNELS, norm_rope
from minimax_kernels.project_norm_rope.composed import composed, split_heads, turn_normed
from minimax_kernels.triton_call import Launch, ceil_div, triton_call
from minimax_kernels.triton_support import require_weight
from minimax_kernels.weight_tiles import Weight

MOST_TOKENS = 256
LAUNCH = Launch(num_warps=4, num_stages=1)
# of a program. A head of partial sums is a number a thread: the loads of all its splits take a register each, so that
# ptxas leaves them under way together; of four numbers a thread it makes load, add, load, add
HEADS_OF_PARTIALS, HEADS = 1, 4


def project_norm_rope(
    x: Float[Array, "T K"],
    weights: tuple[Weight, ...],
    norms: tuple[Float[Array, "D"] | None, ...],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    eps: float,
    detached: int = 0,
    interpret: bool = False,
) -> tuple[Float[Array, "T H D"], ...]:
    """See `minimax_kernels.project_norm_rope`."""
    if not in_two_launches(x, weights, norms):
        return composed(
            functools.partial(matmul, dtype=x.dtype, interpret=interpret),
            functools.partial(norm_rope, interpret=interpret),
            x, weights, norms, cos, sin, eps=eps, detached=detached,
        )  # fmt: skip
    for weight in weights:
        require_weight(x, weight, interpret=interpret)
    products = partial_products(x, weights, dtype=x.dtype, interpret=interpret)
    heads = split_heads(products, norms)
    options: dict[str, Any] = {"dtype": x.dtype, "eps": eps, "interpret": interpret}
    if products[0].ndim == 3:
        return _sum_norm_rope(heads, norms, cos, sin, **options)
    # whole already: what has no norm is done
    return turn_normed(
        lambda heads, norms: _sum_norm_rope([own[None] for own in heads], norms, cos, sin, **options), heads, norms
    )


def in_two_launches(x: jax.Array, weights: Sequence[Weight], norms: Sequence[jax.Array | None]) -> bool:
    """Whether rows are few, and the product is a kernel of ours."""
    if any(norm is not None and norm.shape[0] > MOST_CHANNELS for norm in norms):
        return False
    return 1 <= x.shape[0] <= MOST_TOKENS and not left_to_xla(x, weights)


def _sum_norm_rope(
    partials: Sequence[Float[Array, "splits T H D"]],
    norms: Sequence[Float[Array, "D"] | None],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    dtype: Any,
    eps: float,
    interpret: bool,
) -> tuple[Float[Array, "T H D"], ...]:
    shapes = tuple(jax.ShapeDtypeStruct(partial.shape[1:], dtype) for partial in partials)
    step = HEADS if partials[0].shape[0] == 1 else HEADS_OF_PARTIALS
    programs = [ceil_div(shape.shape[0] * shape.shape[1], step) for shape in shapes]
    return triton_call(
        functools.partial(
            _sum_norm_rope_kernel,
            programs=programs, normed=[norm is not None for norm in norms], step=step, eps=eps,
        ),
        [*partials, *(norm for norm in norms if norm is not None), cos, sin],
        shapes,
        grid=(sum(programs),),
        launch=LAUNCH,
        name="sum_norm_rope",
        interpret=interpret,
    )  # fmt: skip


def _sum_norm_rope_kernel(*refs: Any, programs: list[int], normed: list[bool], step: int, eps: float) -> None:
    """Each array has programs of its own, one after the other."""
    count, program = len(programs), pl.program_id(0)
    partial_refs, (*norm_refs, cos_ref, sin_ref), out_refs = refs[:count], refs[count:-count], refs[-count:]
    first = 0
    for i, own in enumerate(programs):
        norm_ref = norm_refs[sum(normed[:i])] if normed[i] else None
        heads = functools.partial(
            _heads, partial_refs[i], norm_ref, cos_ref, sin_ref, out_refs[i], program - first, step=step, eps=eps
        )
        pl.when((program >= first) & (program < first + own))(heads)
        first += own


def _heads(
    partial_ref: Any, norm_ref: Any, cos_ref: Any, sin_ref: Any, out_ref: Any, block: jax.Array, *,
    step: int, eps: float,
) -> None:  # fmt: skip
    tile = head_tile(out_ref, block, step)

    def load(channel: jax.Array) -> jax.Array:
        at = tile.token[:, None], tile.head[:, None], channel[None, :]
        parts = [
            plgpu.load(partial_ref.at[(split, *at)], mask=tile.inside, other=0.0)
            for split in range(partial_ref.shape[0])
        ]
        total = functools.reduce(jnp.add, parts)  # in the order of `sum_splits`
        return total.astype(out_ref.dtype).astype(jnp.float32)

    if norm_ref is None:
        tile.store(load(tile.channel))
    else:
        tile.store(norm_and_turn(tile, load, norm_ref, cos_ref, sin_ref, eps=eps))
