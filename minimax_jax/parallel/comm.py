"""The model's communication points over a mesh, for use inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_jax.model.comm import Comm, Experts
from minimax_jax.parallel.config import HEADS, TOKENS, ParallelConfig
from minimax_jax.parallel.expert_dispatch import ExpertDispatch


class MeshComm(Comm):
    """What a rank says to the others: two sums a layer, and with attention data parallelism what experts need.

    Tokens go to the ranks of their experts as `ExpertDispatch` says.
    """

    def __init__(self, parallel: ParallelConfig, experts_per_rank: int):
        # over axes of one rank nothing need be said
        self._heads, self._tokens = parallel.real(HEADS), parallel.real(TOKENS)
        self._dispatch = ExpertDispatch(parallel, experts_per_rank)

    def lookup(self, table: Float[Array, "V H"], input_ids: Int[Array, "T"]) -> Float[Array, "T H"]:
        """Each rank looks up the ids of its part of the vocabulary; the sum has all."""
        if not self._tokens:
            return table[input_ids]
        local = input_ids - jax.lax.axis_index(self._tokens) * table.shape[0]
        held = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(held[:, None], table[jnp.where(held, local, 0)], 0)
        return jax.lax.psum(rows, self._tokens)

    def sum_tensor(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        return jax.lax.psum(x, self._heads) if self._heads else x

    def sum_mlp(self, x: Float[Array, "T H"]) -> Float[Array, "T H"]:
        return jax.lax.psum(x, self._tokens) if self._tokens else x

    def gather_vocab(self, logits: Float[Array, "T V"]) -> Float[Array, "T V"]:
        return jax.lax.all_gather(logits, self._tokens, axis=1, tiled=True) if self._tokens else logits

    def argmax_vocab(self, logits: Float[Array, "T V"]) -> Int[Array, "T"]:
        """Ranks exchange their best token each: 8 bytes a row, not the logits."""
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if not self._tokens:
            return best
        value = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0].astype(jnp.float32)
        best = best + jax.lax.axis_index(self._tokens) * logits.shape[1]
        both = jnp.stack([jax.lax.bitcast_convert_type(value, jnp.int32), best])
        values, ids = jnp.moveaxis(jax.lax.all_gather(both, self._tokens), 0, 1)
        # of equal values the first rank's, whose ids are lower
        winner = jnp.argmax(jax.lax.bitcast_convert_type(values, jnp.float32), axis=0)
        return jnp.take_along_axis(ids, winner[None], axis=0)[0]

    def run_experts(
        self,
        experts: Experts,
        x: Float[Array, "T H"],
        expert_ids: Int[Array, "T k"],
        weights: Float[Array, "T k"],
        shared: Callable[[Float[Array, "T H"]], Float[Array, "T H"]],
    ) -> Float[Array, "T H"]:
        """See `ExpertDispatch`; `sum_mlp` does the rest, shared expert included."""
        return self._dispatch(experts, x, expert_ids, weights, shared)
