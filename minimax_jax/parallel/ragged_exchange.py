"""Rows that go from each rank to each other one, as many as there are: for use inside `jax.shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ragged_exchange(
    rows: Float[Array, "S H"],
    send_starts: Int[Array, "n"],
    send_counts: Int[Array, "n"],
    place_starts: Int[Array, "n"],
    receive_counts: Int[Array, "n"],
    *,
    num_rows: int,
    axes: tuple[str, ...],
) -> Float[Array, "num_rows H"]:
    """Sends `send_counts[d]` rows from `send_starts[d]` on to rank d, into its result from row `place_starts[d]` on.

    On GPUs `jax.lax.ragged_all_to_all`, which moves these rows and no others. Elsewhere XLA has no such collective, and
    all rows go to all ranks in an all-to-all of one size.

    Args:
      receive_counts: rows that come from each rank.
      num_rows: of the result; rows that nobody sends are zeros.
      axes: of the mesh, along which the n ranks stand.
    """
    operands = rows, send_starts, send_counts, place_starts, receive_counts

    def ragged(rows, send_starts, send_counts, place_starts, receive_counts):
        result = jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows, result, send_starts, send_counts, place_starts, receive_counts, axis_name=axes
        )

    def padded(rows, send_starts, send_counts, place_starts, receive_counts):
        number = jnp.arange(rows.shape[0])
        sent = rows[jnp.minimum(send_starts[:, None] + number, rows.shape[0] - 1)]  # [n, S, H]
        came = jax.lax.all_to_all(sent, axes, split_axis=0, concat_axis=0)
        starts = jax.lax.all_to_all(place_starts, axes, split_axis=0, concat_axis=0, tiled=True)
        places = jnp.where(number < receive_counts[:, None], starts[:, None] + number, num_rows)
        result = jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
        return result.at[places.reshape(-1)].set(came.reshape(-1, rows.shape[1]), mode="drop")

    return jax.lax.platform_dependent(*operands, cuda=ragged, rocm=ragged, default=padded)
