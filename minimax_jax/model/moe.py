"""Mixture of experts: sigmoid router, routed experts and a shared expert."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model.comm import Comm
from minimax_jax.model.linear import linear_float32, normal_init
from minimax_jax.model.mlp import MLP, swiglu
from minimax_jax.model.record import ForwardRecord
from minimax_kernels import choose_experts, route_tokens, routed_experts

FEW_TOKENS = 64  # up to which the choice adds up the logits' partial sums, a launch less


class Router(nnx.Module):
    """Chooses `num_experts_per_tok` experts a token; float32 throughout, whatever the model's type."""

    def __init__(self, config: MiniMaxM3Config, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.num_local_experts)
        self.weight = nnx.Param(normal_init(rngs.params(), shape, jnp.float32))
        self.e_score_correction_bias = nnx.Param(jnp.zeros((config.num_local_experts,), jnp.float32))
        self.config = config

    def logits(self, x: Float[Array, "T H"]) -> Float[Array, "T E"]:
        """Each token's logits for all experts."""
        return linear_float32(x, self.weight[...])

    def __call__(self, x: Float[Array, "T H"]) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        """Expert ids and their weights: sigmoid scores, renormalised, times `routed_scaling_factor`.

        The correction bias takes part in the choice only (`use_routing_bias`).
        """
        if x.shape[0] > FEW_TOKENS:
            return self.choose(self.logits(x))
        return route_tokens(x, self.weight[...], self.e_score_correction_bias[...], **self._options)

    def choose(self, logits: Float[Array, "T E"]) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        """The same from logits."""
        return choose_experts(logits, self.e_score_correction_bias[...], **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_chosen": self.config.num_experts_per_tok, "scale": self.config.routed_scaling_factor}


class Experts(nnx.Module):
    """The routed experts that live on this rank: as many as its weights have."""

    def __init__(self, config: MiniMaxM3Config, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nnx.Param(normal_init(rngs.params(), (experts, hidden, 2 * width), dtype))
        self.down_proj = nnx.Param(normal_init(rngs.params(), (experts, width, hidden), dtype))
        self.config = config

    def __call__(
        self,
        x: Float[Array, "T H"],
        expert_ids: Int[Array, "T k"],
        weights: Float[Array, "T k"],
        addend: Float[Array, "T H"] | None = None,
        first_expert: Int[Array, ""] | int = 0,
    ) -> Float[Array, "T H"]:
        """Weighted sum of each token's experts, added up in float32 in the token's own order of experts; then `addend`.

        Experts elsewhere add nothing: ids outside first_expert..first_expert + E - 1 are theirs.
        """
        return routed_experts(
            x, expert_ids, weights, self.gate_up_proj.get_value(), self.down_proj.get_value(), addend,
            first_expert, activation=swiglu(self.config), num_experts=self.config.num_local_experts,
        )  # fmt: skip


class MoE(nnx.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: MiniMaxM3Config, layer_id: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate = Router(config, rngs)
        self.experts = Experts(config, dtype, rngs)
        self.shared_experts = MLP(config, config.shared_intermediate_size, dtype, rngs)
        self.layer_id = layer_id

    def __call__(self, x: Float[Array, "T H"], comm: Comm, record: ForwardRecord | None = None) -> Float[Array, "T H"]:
        if record is None:
            choice = self.gate(x)
        else:
            logits = self.gate.logits(x)
            record.router_logits.append(logits)
            choice = self.gate.choose(logits)
        expert_ids, weights = comm.route(self.layer_id, *choice)
        return comm.run_experts(self.experts, x, expert_ids, weights, self.shared_experts)
