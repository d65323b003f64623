"""What stands behind the attention boundary: compiled attention over the current pools, a layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minimax_jax.attention.layout import StepLayout, check_pages
from minimax_jax.attention.paged import attend_paged, write_paged
from minimax_jax.attention.transfer import send_together
from minimax_jax.buckets import padded_size
from minimax_jax.cache import PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel import Ranks
from minimax_jax.recent import RecentJits
from minimax_kernels import Batch


class PagedAttention:
    """The attention executables of a model: write the new tokens, then attend, in place.

    One for dense and one for sparse layers, compiled for each combination of tokens, requests and pages a request,
    all of them bucketed, and for the pool's size. Over ranks, operands and results are [ranks, *shape on one rank].

    Attributes:
      ranks: what the model is spread over, None for one device.
      request_buckets, page_buckets: ascending numbers of requests, and of pages a request, to compile for.
      traces: how often one was traced; combinations that were met before leave it unchanged.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        *,
        ranks: Ranks | None = None,
        impl: str | None = None,
        compiler_options: Mapping[str, Any] | None = None,
        request_buckets: Sequence[int] | None = None,
        page_buckets: Sequence[int] | None = None,
    ):
        """
        Args:
          config: of the whole model, or with `ranks` of one rank.
          impl: which kernels to use, None for the best.
          compiler_options: XLA's.
          request_buckets, page_buckets: None for all that `minimax_jax.buckets.bucket` gives. Given few, all of them
            can be warmed up; padding costs little, since kernels skip it.
        """
        self.request_buckets = None if request_buckets is None else tuple(sorted(request_buckets))
        self.page_buckets = None if page_buckets is None else tuple(sorted(page_buckets))
        self.traces, self.ranks = 0, ranks
        self._config, self._impl = config, impl
        self._index_split = None if ranks is None else ranks.index_split
        options = dict(compiler_options) if compiler_options else None

        # pools and output buffer are donated: written where they lie
        def jits() -> tuple[Any, ...]:
            dense, sparse = self._over_ranks(self._dense_layer, 2, 4), self._over_ranks(self._sparse_layer, 3, 6)
            return (
                jax.jit(dense, donate_argnums=(0, 1, 2), compiler_options=options),
                jax.jit(sparse, donate_argnums=(0, 1, 2, 3), compiler_options=options),
            )

        self._dense, self._sparse = jits()
        self._exact = RecentJits(jits)

    def _over_ranks(self, layer: Callable[..., Any], num_pools: int, num_carried: int) -> Callable[..., Any]:
        """A function of its own: `layer`, or with ranks each rank's over its part of pools and carried values."""
        ranks = self.ranks
        if ranks is None:
            return functools.partial(layer)
        caches: Any = ranks.cache_specs
        pools, carried = (caches.k, caches.v, caches.index)[:num_pools], ranks.carried

        def rank(*args: Any) -> tuple[Any, ...]:
            own = (x[0] for x in args[num_pools : num_pools + num_carried])
            *written, out = layer(*args[:num_pools], *own, *args[num_pools + num_carried :])
            return *written, out[None]

        in_specs = (*pools, *(carried,) * num_carried, ranks.rows, ranks.rows)
        return ranks.per_rank(rank, in_specs, (*pools, carried))

    def step(self, pool: PagePool, *layouts: StepLayout) -> StepRuntime:
        """What the boundary needs for one step over a pool, in the pool's current life.

        Args:
          layouts: the step's requests; with data ranks one for each, perhaps of no request.

        Raises:
          ValueError: if a request's pages are not in the pool, or there are not as many layouts as data ranks.
        """
        groups = 1 if self.ranks is None else self.ranks.groups
        if len(layouts) != groups:
            raise ValueError(f"layouts: {len(layouts)} of them, must be {groups}, one for each data rank")
        return StepRuntime(self, pool, layouts, self._config.index_block_size)

    def attend(
        self,
        runtime: StepRuntime,
        layer_id: int,
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        idx_q: Float[Array, "T Hi Di"] | None,
        idx_k: Float[Array, "T 1 Di"] | None,
        out: Float[Array, "T Hq*D"],
        *,
        exact: bool = False,
    ) -> Float[Array, "T Hq*D"]:
        """One layer: launches its executable over the pool's buffers and stores what comes back.

        Rows of `out` past the live tokens keep what they hold. `out` is consumed.

        Args:
          exact: whether the rows are no bucket's: executables of the latest few such sizes are kept.
        """
        num_rows = q.shape[-3]
        dense, sparse = self._exact.get(num_rows) if exact else (self._dense, self._sparse)
        slots, batch = runtime.on_device(num_rows)
        with runtime.pool.borrow_layer(layer_id, runtime.life) as lent:
            if idx_q is None or idx_k is None or lent.index is None:
                lent.k, lent.v, out = dense(lent.k, lent.v, out, q, k, v, slots, batch)
            else:
                lent.k, lent.v, lent.index, out = sparse(
                    lent.k, lent.v, lent.index, out, q, k, v, idx_q, idx_k, slots, batch
                )
        return out

    def _dense_layer(self, k_cache, v_cache, out, q, k, v, slots, batch):
        self.traces += 1
        k_cache, v_cache, _ = write_paged(k_cache, v_cache, None, k, v, None, slots, impl=self._impl)
        out = self._into(out, q, k_cache, v_cache, None, None, batch)
        return k_cache, v_cache, out

    def _sparse_layer(self, k_cache, v_cache, index_cache, out, q, k, v, idx_q, idx_k, slots, batch):
        self.traces += 1
        k_cache, v_cache, index_cache = write_paged(
            k_cache, v_cache, index_cache, k, v, idx_k, slots, index_split=self._index_split, impl=self._impl
        )
        out = self._into(out, q, k_cache, v_cache, idx_q, index_cache, batch)
        return k_cache, v_cache, index_cache, out

    def _into(self, out, q, k_cache, v_cache, idx_q, index_cache, batch):
        return attend_paged(
            self._config, q, k_cache, v_cache, idx_q, index_cache, batch,
            index_split=self._index_split, out=out.reshape(q.shape), impl=self._impl,
        )  # fmt: skip


class StepRuntime:
    """One step's plan over one life of a pool: what `BoundaryCall.runtime` is for the attention boundary.

    Made once for all layers; with several processes each makes it for itself, all of them the same.

    Attributes:
      attention: the executables.
      pool: the pools; epoch and life: which life of theirs this step was prepared for.
      layouts: the requests, by data rank.
      num_tokens: live tokens of the data rank that has the most.
    """

    def __init__(self, attention: PagedAttention, pool: PagePool, layouts: tuple[StepLayout, ...], block_size: int):
        self.attention, self.pool, self.layouts = attention, pool, layouts
        self.epoch, self.life = pool.epoch, pool.epoch.value
        self.num_tokens = max(layout.num_tokens for layout in layouts)
        longest = max(int(layout.kv_lens.max(initial=1)) for layout in layouts)
        rows = padded_size(max(len(layout.kv_lens) for layout in layouts), attention.request_buckets)
        width = padded_size(-(-longest // block_size), attention.page_buckets)
        tables = np.zeros((len(layouts), rows, width), np.int32)
        starts, kv_lens = np.zeros((len(layouts), rows + 1), np.int32), np.zeros((len(layouts), rows), np.int32)
        for group, layout in enumerate(layouts):
            requests, shown = len(layout.kv_lens), layout.block_tables[:, :width]
            tables[group, :requests, : shown.shape[1]] = shown
            held = np.arange(shown.shape[1]) < -(-layout.kv_lens[:, None] // block_size)
            check_pages(shown[held], pool.num_pages)
            starts[group] = layout.num_tokens
            starts[group, : requests + 1] = layout.query_starts
            kv_lens[group, :requests] = layout.kv_lens
        # requests and pages a request rounded up to buckets, data ranks side by side
        self._batch = tables.reshape(-1, width), starts.reshape(-1), kv_lens.reshape(-1)
        self._sent: dict[int, tuple[Int[Array, "T"], Batch]] = {}

    def send(
        self, num_rows: int, *per_token: Sequence[Int[np.ndarray, "T"]], exact: bool = False
    ) -> list[Int[Array, "..."]]:
        """Puts what a step needs on the device, in one transfer, `per_token` arrays included.

        Args:
          num_rows: a bucket's; rows past the live ones are zeros, and name no slot.
          per_token: values of the live tokens, by data rank.
          exact: whether `num_rows` is no bucket's.

        Returns:
          `per_token`, each [num_rows], over ranks [num_rows, data ranks].
        """
        padded = np.zeros((len(per_token), num_rows, len(self.layouts)), np.int32)
        for target, by_rank in zip(padded, per_token, strict=True):
            for group, values in enumerate(by_rank):
                target[: len(values), group] = values
        slots = np.full((len(self.layouts), num_rows), -1, np.int32)
        for group, layout in enumerate(self.layouts):
            slots[group, : len(layout.slots)] = layout.slots
        ranks, rest = self.attention.ranks, (slots.reshape(-1), *self._batch)
        if ranks is None:
            sent = send_together([*padded[:, :, 0], *rest], exact=exact)
        else:
            specs = [ranks.columns] * len(padded) + [ranks.rows] * len(rest)
            sent = ranks.place([*padded, *rest], specs)
        self._sent[num_rows] = sent[len(per_token)], Batch(*sent[-3:])
        return sent[: len(per_token)]

    def on_device(self, num_rows: int) -> tuple[Int[Array, "T"], Batch]:
        """(the tokens' slots, the requests) on the device, sent when they are needed first."""
        if num_rows not in self._sent:
            self.send(num_rows)
        return self._sent[num_rows]
