"""How tokens come to the ranks of their experts and back: for use inside `jax.shard_map`. No token is ever dropped."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_jax.model.comm import Experts
from minimax_jax.parallel.config import EXPERTS, OUTER, REPLICA, REQUESTS, TOKENS, ParallelConfig
from minimax_jax.parallel.expert_routes import summed, taken, token_routes
from minimax_jax.parallel.ragged_exchange import ragged_exchange
from minimax_jax.parallel.row_gather import RowGather


class ExpertDispatch:
    """Runs experts that are dealt to ranks. Three ways, by what is there; shapes alone decide.

    - No data ranks: every rank has all tokens and works on those that chose its experts.
    - All-gather: tokens go to all data ranks, sums come back by reduce-scatter.
    - All-to-all (`ParallelConfig.all_to_all_tokens`): tokens go to the data ranks of their experts only.

    The result is this rank's part of a sum over the ranks that hold the same tokens.
    """

    def __init__(self, parallel: ParallelConfig, experts_per_rank: int):
        self._parallel, self._experts_per_rank = parallel, experts_per_rank
        self._rows = RowGather(parallel)
        self._requests, self._experts = parallel.real(REQUESTS), parallel.real(EXPERTS)
        self._columns = parallel.real((REPLICA, OUTER))

    def __call__(
        self,
        experts: Experts,
        x: Float[Array, "T H"],
        expert_ids: Int[Array, "T k"],
        weights: Float[Array, "T k"],
        shared: Callable[[Float[Array, "T H"]], Float[Array, "T H"]],
    ) -> Float[Array, "T H"]:
        """`experts` is given rows, ids of all ranks' experts, weights, and which of the ids is this rank's first.

        `shared` is for this rank's own tokens, and runs while the experts' sums are on their way back.
        """
        if not self._requests:
            return experts(x, expert_ids, weights, shared(x), self._first_expert())
        all_ids, all_weights = self._all_choices(expert_ids, weights)
        if self._exchanges(all_ids.shape[0]):
            outputs, come_back = self._by_all_to_all(experts, x, all_ids, all_weights)
        else:
            outputs = experts(self._rows.gather(x), all_ids, all_weights, None, self._first_expert())
            come_back = self._rows.scatter_sums
        # else XLA may merge the shared expert's products with the router's, before anything is under way
        outputs, x = jax.lax.optimization_barrier((outputs, x))
        return come_back(outputs) + shared(x)

    def _exchanges(self, tokens: int) -> bool:
        least = self._parallel.all_to_all_tokens
        # between hosts each of several ranks with the same tokens would send them: a share of each is less
        several = self._parallel.hosts > 1 and self._parallel.size(TOKENS) > 1
        return least is not None and tokens >= least and not several

    def _all_choices(
        self, expert_ids: Int[Array, "t k"], weights: Float[Array, "t k"]
    ) -> tuple[Int[Array, "n*t k"], Float[Array, "n*t k"]]:
        choices = jnp.stack([expert_ids, jax.lax.bitcast_convert_type(weights, jnp.int32)], axis=1)
        choices = jax.lax.all_gather(choices, self._requests, tiled=True)
        return choices[:, 0], jax.lax.bitcast_convert_type(choices[:, 1], jnp.float32)

    def _first_expert(self) -> Int[Array, ""] | int:
        return jax.lax.axis_index(self._experts) * self._experts_per_rank if self._experts else 0

    def _by_all_to_all(
        self, experts: Experts, x: Float[Array, "t H"], all_ids: Int[Array, "n*t k"], all_weights: Float[Array, "n*t k"]
    ) -> tuple[Float[Array, "n*t H"], Callable[[Float[Array, "n*t H"]], Float[Array, "t H"]]]:
        """What the experts give where they are, and how that comes back."""
        ranks, columns = self._parallel.size(REQUESTS), self._parallel.size((REPLICA, OUTER))
        expert_ranks = all_ids // self._experts_per_rank
        destinations = expert_ranks // columns
        if self._columns:
            here = expert_ranks % columns == jax.lax.axis_index(self._columns)
            destinations = jnp.where(here, destinations, ranks)
        routes = token_routes(destinations.reshape(ranks, -1, all_ids.shape[1]), jax.lax.axis_index(self._requests))
        rows = ragged_exchange(x[routes.sent], *routes.there, num_rows=all_ids.shape[0], axes=self._requests)
        ids = taken(all_ids, routes.arrived, -1)  # an expert that nobody has
        outputs = experts(rows, ids, taken(all_weights, routes.arrived, 0.0), None, self._first_expert())

        def come_back(outputs: Float[Array, "n*t H"]) -> Float[Array, "t H"]:
            answers = ragged_exchange(outputs, *routes.back, num_rows=routes.sent.shape[0], axes=self._requests)
            return summed(answers, routes.slots)

        return outputs, come_back
