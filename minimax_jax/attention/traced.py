"""Attention over functional caches inside one whole-step jit."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_jax.attention.paged import attend_paged, write_paged
from minimax_jax.cache.pages import PagedCaches
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel import IndexSplit
from minimax_kernels import Batch


class TracedAttend:
    """`attend` that writes each layer's new tokens to its pages and attends to what the pages hold.

    Lives for one trace: after the model ran, `caches()` are the updated pools to return (donate the old ones).

    Args:
      caches: the pools that the step was given.
      batch: the requests of the step.
      slots: [T] page * B + offset of each token, -1 for padding rows.
      index_split: what shares out the index keys, of which the caches then hold this rank's; None for nothing.
      impl: which kernels to use, None for the best.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        caches: PagedCaches,
        batch: Batch,
        slots: Int[Array, "T"],
        *,
        index_split: IndexSplit | None = None,
        impl: str | None = None,
    ):
        self.config, self.batch, self.slots, self.impl = config, batch, slots, impl
        self.index_split = index_split
        self._k, self._v, self._index = list(caches.k), list(caches.v), list(caches.index)

    def __call__(
        self,
        layer_id: int,
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        idx_q: Float[Array, "T Hi Di"] | None,
        idx_k: Float[Array, "T 1 Di"] | None,
    ) -> Float[Array, "T Hq*D"]:
        k_cache, v_cache, index_cache = write_paged(
            self._k[layer_id], self._v[layer_id], self._index[layer_id], k, v, idx_k, self.slots,
            index_split=self.index_split, impl=self.impl,
        )  # fmt: skip
        self._k[layer_id], self._v[layer_id], self._index[layer_id] = k_cache, v_cache, index_cache
        return attend_paged(
            self.config, q, k_cache, v_cache, idx_q, index_cache, self.batch,
            index_split=self.index_split, impl=self.impl,
        )  # fmt: skip

    def caches(self) -> PagedCaches:
        """The pools after the layers that have run."""
        return PagedCaches(tuple(self._k), tuple(self._v), tuple(self._index))
