"""What stands behind the attention boundary: compiled attention over the current pools, a layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from minimax_jax.attention.layout import StepLayout, check_pages
from minimax_jax.attention.paged import attend_paged
from minimax_jax.attention.transfer import send_together
from minimax_jax.buckets import padded_size
from minimax_jax.cache import PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.recent import RecentJits
from minimax_kernels import Batch, write_index, write_kv


class PagedAttention:
    """The attention executables of a model: write the new tokens, then attend, in place.

    One for dense and one for sparse layers, compiled for each combination of tokens, requests and pages a request,
    all of them bucketed, and for the pool's size.

    Attributes:
      request_buckets, page_buckets: ascending numbers of requests, and of pages a request, to compile for.
      traces: how often one was traced; combinations that were met before leave it unchanged.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        *,
        impl: str | None = None,
        compiler_options: Mapping[str, Any] | None = None,
        request_buckets: Sequence[int] | None = None,
        page_buckets: Sequence[int] | None = None,
    ):
        """
        Args:
          impl: which kernels to use, None for the best.
          compiler_options: XLA's.
          request_buckets, page_buckets: None for all that `minimax_jax.buckets.bucket` gives. Given few, all of them
            can be warmed up; padding costs little, since kernels skip it.
        """
        self.request_buckets = None if request_buckets is None else tuple(sorted(request_buckets))
        self.page_buckets = None if page_buckets is None else tuple(sorted(page_buckets))
        self.traces = 0
        self._config, self._impl = config, impl
        options = dict(compiler_options) if compiler_options else None

        # pools and output buffer are donated: written where they lie
        def jits() -> tuple[Any, ...]:
            dense, sparse = functools.partial(self._dense_layer), functools.partial(self._sparse_layer)
            return (
                jax.jit(dense, donate_argnums=(0, 1, 2), compiler_options=options),
                jax.jit(sparse, donate_argnums=(0, 1, 2, 3), compiler_options=options),
            )

        self._dense, self._sparse = jits()
        self._exact = RecentJits(jits)

    def step(self, pool: PagePool, layout: StepLayout) -> StepRuntime:
        """What the boundary needs for one step over a pool, in the pool's current life.

        Raises:
          ValueError: if a request's pages are not in the pool.
        """
        return StepRuntime(self, pool, layout, self._config.index_block_size)

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
        dense, sparse = self._exact.get(q.shape[0]) if exact else (self._dense, self._sparse)
        slots, batch = runtime.on_device(q.shape[0])
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
        k_cache, v_cache = write_kv(k_cache, v_cache, k, v, slots, impl=self._impl)
        out = self._into(out, q, k_cache, v_cache, None, None, batch)
        return k_cache, v_cache, out

    def _sparse_layer(self, k_cache, v_cache, index_cache, out, q, k, v, idx_q, idx_k, slots, batch):
        self.traces += 1
        k_cache, v_cache = write_kv(k_cache, v_cache, k, v, slots, impl=self._impl)
        index_cache = write_index(index_cache, idx_k, slots, impl=self._impl)
        out = self._into(out, q, k_cache, v_cache, idx_q, index_cache, batch)
        return k_cache, v_cache, index_cache, out

    def _into(self, out, q, k_cache, v_cache, idx_q, index_cache, batch):
        return attend_paged(
            self._config, q, k_cache, v_cache, idx_q, index_cache, batch, out=out.reshape(q.shape), impl=self._impl
        )


class StepRuntime:
    """One step's plan over one life of a pool: what `BoundaryCall.runtime` is for the attention boundary.

    Attributes:
      attention: the executables.
      pool: the pools; epoch and life: which life of theirs this step was prepared for.
      layout: the requests.
    """

    def __init__(self, attention: PagedAttention, pool: PagePool, layout: StepLayout, block_size: int):
        self.attention, self.pool, self.layout = attention, pool, layout
        self.epoch, self.life = pool.epoch, pool.epoch.value
        requests, pages = len(layout.kv_lens), -(-int(layout.kv_lens.max(initial=1)) // block_size)
        rows = padded_size(requests, attention.request_buckets)
        width = padded_size(pages, attention.page_buckets)
        tables = np.zeros((rows, width), np.int32)
        shown = layout.block_tables[:, :width]
        tables[:requests, : shown.shape[1]] = shown
        held = np.arange(shown.shape[1]) < -(-layout.kv_lens[:, None] // block_size)
        check_pages(shown[held], pool.num_pages)
        starts = np.full(rows + 1, layout.num_tokens, np.int32)
        starts[: requests + 1] = layout.query_starts
        kv_lens = np.zeros(rows, np.int32)
        kv_lens[:requests] = layout.kv_lens
        self._batch = tables, starts, kv_lens  # requests and pages a request rounded up to buckets
        self._sent: dict[int, tuple[Int[Array, "T"], Batch]] = {}

    def send(self, num_rows: int, *per_token: Int[np.ndarray, "T"]) -> list[Int[Array, "T"]]:
        """Puts what a step needs on the device, in one transfer, `per_token` arrays included.

        Args:
          num_rows: a bucket's; rows past the live ones are zeros, and name no slot.
        """
        live = self.layout.num_tokens
        padded = np.zeros((len(per_token), num_rows), np.int32)
        for row, values in zip(padded, per_token, strict=True):
            row[:live] = values
        slots = np.full(num_rows, -1, np.int32)
        slots[: len(self.layout.slots)] = self.layout.slots
        sent = send_together([*padded, slots, *self._batch])
        self._sent[num_rows] = sent[len(per_token)], Batch(*sent[-3:])
        return sent[: len(per_token)]

    def on_device(self, num_rows: int) -> tuple[Int[Array, "T"], Batch]:
        """(the tokens' slots, the requests) on the device, sent when they are needed first."""
        if num_rows not in self._sent:
            self.send(num_rows)
        return self._sent[num_rows]
