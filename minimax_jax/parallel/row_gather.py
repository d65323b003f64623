"""Tokens of all data ranks on each of them, and sums of theirs back; over hosts in two steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_jax.parallel.config import DATA, HOST, REQUESTS, TOKENS, ParallelConfig


@dataclasses.dataclass(frozen=True)
class RowGather:
    """Gathers rows over the data ranks and scatters sums, for use inside `jax.shard_map`.

    On one host each is one collective. Over several, ranks that hold the same tokens would all send these between the
    hosts; so each sends its share of every row there, and the hosts put rows together over their own, faster links. On
    the way back a host sums first.

    Attributes:
      parallel: the sizes.
    """

    parallel: ParallelConfig

    def gather(self, x: Float[Array, "t H"]) -> Float[Array, "n*t H"]:
        """All data ranks' rows, in the order of the ranks."""
        if self.parallel.hosts == 1:
            return jax.lax.all_gather(x, self._real(REQUESTS), tiled=True)
        rows, width = x.shape[0], x.shape[1] // self._shares
        part = jax.lax.all_gather(self._own_share(x), HOST)  # [hosts, t, width]
        if not self._inside:
            return part.reshape(-1, width)
        parts = jax.lax.all_gather(part, self._inside)
        parts = parts.reshape(self._local, self._shares, self.parallel.hosts, rows, width)
        return parts.transpose(2, 0, 3, 1, 4).reshape(-1, x.shape[1])

    def scatter_sums(self, y: Float[Array, "n*t H"]) -> Float[Array, "t H"]:
        """Sums over the data ranks, each of which keeps its own rows.

        Over several hosts the ranks with the same tokens are summed too: of their results each has a share and zeros
        elsewhere, so that the sum over them (`Comm.sum_mlp`) is the same as without hosts.
        """
        if self.parallel.hosts == 1:
            return jax.lax.psum_scatter(y, self._real(REQUESTS), tiled=True)
        hosts, width = self.parallel.hosts, y.shape[1] // self._shares
        parts = y.reshape(hosts, self._local, -1, self._shares, width).transpose(1, 3, 0, 2, 4)
        parts = parts.reshape(self._local * self._shares, hosts, -1, width)
        own = jax.lax.psum_scatter(parts, self._inside) if self._inside else parts[0]
        share = jax.lax.psum_scatter(own, HOST)
        if self._shares == 1:
            return share
        place = jax.lax.axis_index(self._real(TOKENS)) * width
        return jax.lax.dynamic_update_slice(jnp.zeros((share.shape[0], y.shape[1]), y.dtype), share, (0, place))

    def _own_share(self, x: Float[Array, "t H"]) -> Float[Array, "t width"]:
        if self._shares == 1:
            return x
        width = x.shape[1] // self._shares
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self._real(TOKENS)) * width, width, axis=1)

    @property
    def _shares(self) -> int:
        """Ranks that hold the same tokens."""
        return self.parallel.size(TOKENS)

    @property
    def _local(self) -> int:
        """Data ranks of one host."""
        return self.parallel.size((DATA,))

    @property
    def _inside(self) -> tuple[str, ...]:
        """The axes within a host."""
        return self._real((DATA, *TOKENS))

    def _real(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return self.parallel.real(axes)
