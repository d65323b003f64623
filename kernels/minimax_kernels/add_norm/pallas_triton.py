"""Residual addition and RMS normalisation in one pass: a program holds a row, which XLA reads twice in two launches."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from minimax_kernels.triton_call import Launch, next_power_of_two, triton_call
from minimax_kernels.triton_support import NARROW

MOST_CHANNELS = 16384  # of a row that one program's registers hold
LAUNCH = Launch(num_warps=8, num_stages=1)


def add_norm(
    x: Float[Array, "T H"],
    update: Float[Array, "T H"],
    weight: Float[Array, "H"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
    """See `minimax_kernels.add_norm`."""
    num_tokens, hidden = x.shape
    if str(x.dtype) not in NARROW and not interpret:
        raise NotImplementedError(f"pallas_triton: rows are {x.dtype}, not one of {', '.join(NARROW)}")
    if hidden > MOST_CHANNELS:
        raise NotImplementedError(f"pallas_triton: H = {hidden} channels are more than {MOST_CHANNELS}")
    if num_tokens == 0:
        return x, x
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return triton_call(
        functools.partial(_add_norm_kernel, eps=eps),
        [x, update, weight],
        (like, like),
        grid=(num_tokens,),
        launch=LAUNCH,
        name="add_norm",
        interpret=interpret,
    )


def _add_norm_kernel(
    x_ref: Any, update_ref: Any, weight_ref: Any, sum_ref: Any, normed_ref: Any, *, eps: float
) -> None:
    hidden = x_ref.shape[1]
    token, channel = pl.program_id(0), jnp.arange(next_power_of_two(hidden), dtype=jnp.int32)
    inside = channel < hidden

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref.at[token, channel], mask=inside, other=0.0).astype(jnp.float32)

    # rounded as the addition alone would have been: the norm is of what the residual is from here on
    total = (load(x_ref) + load(update_ref)).astype(x_ref.dtype)
    wide = total.astype(jnp.float32)
    mean = jnp.sum(wide * wide) / hidden
    gain = 1.0 + plgpu.load(weight_ref.at[channel], mask=inside, other=0.0).astype(jnp.float32)
    plgpu.store(sum_ref.at[token, channel], total, mask=inside)
    plgpu.store(
        normed_ref.at[token, channel], (wide * jax.lax.rsqrt(mean + eps) * gain).astype(x_ref.dtype), mask=inside
    )
