"""The gated MLP with MiniMax-M3's clamped activation."""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model.linear import linear, normal_init
from minimax_kernels import Swiglu


def swiglu(config: MiniMaxM3Config) -> Swiglu:
    """The activation with the config's constants."""
    return Swiglu(config.swiglu_alpha, config.swiglu_beta, config.swiglu_limit)


class MLP(nnx.Module):
    """The MLP of the dense layers, and the shared expert."""

    def __init__(self, config: MiniMaxM3Config, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate_up_proj = nnx.Param(normal_init(rngs.params(), (config.hidden_size, 2 * width), dtype))
        self.down_proj = nnx.Param(normal_init(rngs.params(), (width, config.hidden_size), dtype))
        self.config = config

    def __call__(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        """The result is this rank's part of the sum over tensor ranks."""
        gated = linear(x, self.gate_up_proj.get_value(), activation=swiglu(self.config))
        return linear(gated, self.down_proj.get_value())
