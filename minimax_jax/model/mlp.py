"""The gated MLP with MiniMax-M3's clamped activation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model.linear import linear, normal_init


def swigluoai(gate_up: Float[Array, "T 2F"], config: MiniMaxM3Config) -> Float[Array, "T F"]:
    """(up + beta) * gate * sigmoid(alpha * gate), gate clamped above and up on both sides.

    Constants are `swiglu_alpha`, `swiglu_beta` and `swiglu_limit`; the input is [gate | up].
    """
    limit = config.swiglu_limit
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return ((up + config.swiglu_beta) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)).astype(gate_up.dtype)


class MLP(nnx.Module):
    """The MLP of the dense layers, and the shared expert."""

    def __init__(self, config: MiniMaxM3Config, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate_up_proj = nnx.Param(normal_init(rngs.params(), (config.hidden_size, 2 * width), dtype))
        self.down_proj = nnx.Param(normal_init(rngs.params(), (width, config.hidden_size), dtype))
        self.config = config

    def __call__(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        """The result is this rank's part of the sum over tensor ranks."""
        gated = swigluoai(linear(x, self.gate_up_proj.get_value()), self.config)
        return linear(gated, self.down_proj.get_value())
