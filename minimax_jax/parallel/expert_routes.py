"""Which tokens go to which rank for their experts, and where they stand there; the same on every rank, exactly.

Every rank of a column (ranks that differ in their data rank alone) knows all choices, so nobody need be told counts.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Routes:
    """One rank's part in an exchange of tokens; each token goes to a rank once, however many of its experts are there.

    Attributes:
      counts: [n, n] tokens that go from data rank to data rank.
      sent: [S] this rank's tokens in the order in which they leave; padding after them.
      arrived: [n * t] tokens of all ranks in the order in which they arrive, n * t for none.
      slots: [t, k] where the answer for a choice will stand among those that come back, -1 if it is none's first.
      rank: this data rank.
    """

    counts: Int[Array, "n n"]
    sent: Int[Array, "S"]
    arrived: Int[Array, "n*t"]
    slots: Int[Array, "t k"]
    rank: Int[Array, ""]

    @property
    def there(self) -> tuple[Int[Array, "n"], Int[Array, "n"], Int[Array, "n"], Int[Array, "n"]]:
        """Where to send from, how many, where to place them, how many come: to the experts."""
        counts, rank = self.counts, self.rank
        return _before(counts[rank]), counts[rank], _before(counts, axis=0)[rank], counts[:, rank]

    @property
    def back(self) -> tuple[Int[Array, "n"], Int[Array, "n"], Int[Array, "n"], Int[Array, "n"]]:
        """The same for the way back."""
        counts, rank = self.counts, self.rank
        return _before(counts[:, rank]), counts[:, rank], _before(counts, axis=1)[:, rank], counts[rank]


def token_routes(destinations: Int[Array, "n t k"], rank: Int[Array, ""]) -> Routes:
    """The routes of one column of ranks.

    Args:
      destinations: the data rank of each choice's expert, n for those that are in no rank of this column.
      rank: this data rank.
    """
    ranks, tokens, choices = destinations.shape
    wanted = (destinations[..., None] == jnp.arange(ranks)).any(axis=2)  # [n, t, n]
    counts = wanted.sum(axis=1, dtype=jnp.int32)
    own = wanted[rank].T.reshape(-1)  # by destination, then token
    (sent,) = jnp.nonzero(own, size=tokens * min(choices, ranks), fill_value=0)
    (arrived,) = jnp.nonzero(wanted[:, :, rank].reshape(-1), size=ranks * tokens, fill_value=ranks * tokens)
    order = (jnp.cumsum(own) - 1).reshape(ranks, tokens)  # places among those that were sent
    mine = destinations[rank]
    same = mine[:, :, None] == mine[:, None, :]
    first = ~(same & jnp.tri(choices, k=-1, dtype=bool)).any(axis=2) & (mine < ranks)
    places = order[jnp.minimum(mine, ranks - 1), jnp.arange(tokens)[:, None]]
    return Routes(counts, sent % tokens, arrived, jnp.where(first, places, -1), rank)


def summed(answers: Float[Array, "S H"], slots: Int[Array, "t k"]) -> Float[Array, "t H"]:
    """The sum of each token's answers, in float32 and in the token's own order of experts."""
    total = jnp.zeros((slots.shape[0], answers.shape[1]), jnp.float32)
    for place in slots.T:
        here: Bool[Array, "t 1"] = (place >= 0)[:, None]
        total += jnp.where(here, answers[jnp.maximum(place, 0)].astype(jnp.float32), 0)
    return total.astype(answers.dtype)


def _before(counts: Int[Array, "..."], axis: int = 0) -> Int[Array, "..."]:
    """What comes before each."""
    return jnp.cumsum(counts, axis=axis, dtype=jnp.int32) - counts


def taken(values: Array, rows: Int[Array, "S"], missing: Array | int | float) -> Array:
    """Rows of `values`; `missing` for numbers past the last."""
    kept = (rows < values.shape[0]).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(kept, values[jnp.minimum(rows, values.shape[0] - 1)], missing)
