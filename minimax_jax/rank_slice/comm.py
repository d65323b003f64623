"""What one rank says to the others where there are none: local copies of the same size."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_jax.model.comm import Comm, Experts


class SliceComm(Comm):
    """The communication points of one rank of `MeshComm`, without data parallelism, each replaced by a copy.

    Tokens choose among all experts; this rank's work on those that chose them. Results are this rank's part of what
    the ranks' sum would be, so numbers mean nothing, but every matrix product has its real size.
    """

    def __init__(self, place: int, ranks: int, experts_per_rank: int, expert_place: int):
        """
        Args:
          place, ranks: of this rank among those that share the vocabulary, and how many they are.
          experts_per_rank, expert_place: experts of a rank, and which ranks' experts these are.
        """
        self._place, self._ranks = place, ranks
        self._experts, self._expert_place = experts_per_rank, expert_place

    def lookup(self, table: Float[Array, "V H"], input_ids: Int[Array, "T"]) -> Float[Array, "T H"]:
        local = input_ids - self._place * table.shape[0]
        held = (local >= 0) & (local < table.shape[0])
        # ids of other ranks' vocabulary take some row of this one's: hidden states must not be zeros
        return _copied(jnp.where(held[:, None], table[jnp.where(held, local, 0)], table[input_ids % table.shape[0]]))

    def sum_tensor(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        return _copied(x)

    def gather_vocab(self, logits: Float[Array, "T V"]) -> Float[Array, "T V"]:
        return jnp.tile(logits, (1, self._ranks))

    def argmax_vocab(self, logits: Float[Array, "T V"]) -> Int[Array, "T"]:
        return super().argmax_vocab(logits) + self._place * logits.shape[1]

    def run_experts(
        self,
        experts: Experts,
        x: Float[Array, "T H"],
        expert_ids: Int[Array, "T k"],
        weights: Float[Array, "T k"],
        shared: Callable[[Float[Array, "T H"]], Float[Array, "T H"]],
    ) -> Float[Array, "T H"]:
        """All tokens are here."""
        return experts(x, expert_ids, weights, shared(x), self._expert_place * self._experts)


def _copied(x: Float[Array, "T H"]) -> Float[Array, "T H"]:
    """Reads and writes all of `x`, in a way that the compiler cannot see through."""
    x = jax.lax.optimization_barrier(x)
    alive = jnp.abs(x[:1, :1]) >= 0  # unless it is NaN, which then goes on
    return jax.lax.optimization_barrier(jnp.where(alive, x, jnp.nan))
