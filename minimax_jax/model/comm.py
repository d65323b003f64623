"""What a model asks of the ranks it runs on; on one device, nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Experts(Protocol):
    """The experts of one rank."""

    def __call__(
        self,
        x: Float[Array, "S H"],
        expert_ids: Int[Array, "S k"],
        weights: Float[Array, "S k"],
        addend: Float[Array, "S H"] | None = None,
        first_expert: Int[Array, ""] | int = 0,
        /,
    ) -> Float[Array, "S H"]:
        """Rows, expert ids and weights to each row's weighted sum, plus its addend if there are such.

        Args:
          first_expert: the id of this rank's first expert; ids of other ranks' experts, and negative ones, add nothing.
        """
        ...


class Comm:
    """The communication points of the model; this class is the one-device case, the identity at each.

    A parallel layout passes a subclass beside `attend`; the modules stay the same.
    """

    def lookup(self, table: Float[Array, "V H"], input_ids: Int[Array, "T"]) -> Float[Array, "T H"]:
        """Rows of the embedding table, which may be split by vocabulary."""
        return table[input_ids]

    def sum_tensor(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        """Sums partial results over the ranks that share heads (after o_proj)."""
        return x

    def sum_mlp(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        """Sums partial results over the ranks that hold the same tokens (after down_proj, of all experts)."""
        return self.sum_tensor(x)

    def gather_vocab(self, logits: Float[Array, "T V"]) -> Float[Array, "T V"]:
        """Joins the vocabulary slices of the ranks' logits."""
        return logits

    def argmax_vocab(self, logits: Float[Array, "T V"]) -> Int[Array, "T"]:
        """The likeliest token of each row, int32, from the ranks' slices of the logits; of equal ones the lowest id."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def route(
        self, layer_id: int, expert_ids: Int[Array, "T k"], weights: Float[Array, "T k"]
    ) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
        """Sees every routing decision of layer `layer_id`, in global expert ids, before tokens are dispatched."""
        return expert_ids, weights

    def run_experts(
        self,
        experts: Experts,
        x: Float[Array, "T H"],
        expert_ids: Int[Array, "T k"],
        weights: Float[Array, "T k"],
        shared: Callable[[Float[Array, "T H"]], Float[Array, "T H"]],
    ) -> Float[Array, "T H"]:
        """Brings tokens to the ranks of their experts, runs `experts` on what is there, brings the sums back, and adds.

        Args:
          expert_ids: of all ranks' experts.
          shared: what every token gets besides, from where it is; may run while sums come back.
        """
        return experts(x, expert_ids, weights, shared(x))


SINGLE_DEVICE = Comm()
