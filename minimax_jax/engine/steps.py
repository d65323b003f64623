"""The two compiled steps of generation: prefill of flat tokens, and decode of one token a row.

Weights go in as flat leaves and are merged into modules inside the trace; caches are donated, so they are
updated in place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from minimax_jax.attention import TracedAttend
from minimax_jax.cache import PagedCaches
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.sampler import SamplingState, pick_tokens, sampling_specs
from minimax_jax.engine.segmented_prefill import SegmentedPrefill
from minimax_jax.model import SINGLE_DEVICE, merge_model
from minimax_jax.parallel import Ranks
from minimax_kernels import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one decode step hands to the next, on the device.

    Attributes:
      tokens: [R] the newest token of each row, not yet in the caches.
      kv_lens: [R] tokens of each row in the caches; 0 marks a row that is only padding.
      caches: the page pools.
    """

    tokens: Int[Array, "R"]
    kv_lens: Int[Array, "R"]
    caches: PagedCaches


MAX_PREFILL_TOKENS = 8192  # prompt tokens of one prefill step; longer prompts take several


class Steps:
    """Compiled steps of one model. Shapes decide what is compiled; nothing retraces for other values.

    Attributes:
      traces: how often each step was traced, by name; steady generation leaves it unchanged.
    """

    def __init__(
        self, config: MiniMaxM3Config, graphdef: nnx.GraphDef, names: tuple[str, ...], ranks: Ranks | None = None
    ):
        """
        Args:
          config, graphdef: of the whole model, or with `ranks` of one rank.
          ranks: what the model is spread over. Every rank of a data group gets the group's rows; see `Ranks`.
        """
        self.traces = {"prefill": 0, "decode": 0}
        self.ranks = ranks
        self._comm = SINGLE_DEVICE if ranks is None else ranks.comm
        self._config, self._graphdef, self._names = config, graphdef, names
        self.prefill = jax.jit(self._prefill, donate_argnums=(1,), static_argnames=("greedy", "truncated"))
        self.decode = jax.jit(self._decode, donate_argnums=(1,), static_argnames=("greedy", "truncated"))

    @functools.cached_property
    def segmented(self) -> SegmentedPrefill:
        """Prefill and mixed steps as segments; built when first asked for."""
        return SegmentedPrefill(self._config, self._graphdef, self._names, max_tokens=MAX_PREFILL_TOKENS)

    def _model(self, leaves: list[Array]):
        return merge_model(self._graphdef, dict(zip(self._names, leaves, strict=True)))

    def _prefill(
        self,
        leaves: list[Array],
        caches: PagedCaches,
        tokens: Int[Array, "T"],
        positions: Int[Array, "T"],
        slots: Int[Array, "T"],
        batch: Batch,
        sampling: SamplingState,
        *,
        greedy: bool,
        truncated: bool,
    ) -> tuple[Int[Array, "R"], PagedCaches]:
        """Runs a chunk of flat prompt tokens; returns the token after the last one of each request."""
        self.traces["prefill"] += 1
        run: Callable[..., Any] = functools.partial(self._prefill_rank, greedy=greedy, truncated=truncated)
        if (ranks := self.ranks) is not None:
            given = [ranks.weight_specs(self._names), ranks.cache_specs, *(ranks.rows,) * 4, sampling_specs(ranks.rows)]
            run = ranks.per_rank(run, tuple(given), (ranks.rows, ranks.cache_specs))
        return run(leaves, caches, tokens, positions, slots, batch, sampling)

    def _prefill_rank(self, leaves, caches, tokens, positions, slots, batch, sampling, *, greedy, truncated):
        model, comm = self._model(leaves), self._comm
        attend = TracedAttend(self._config, caches, batch, slots)
        hidden = model.run_layers(model.embed(tokens, comm), positions, attend, comm)
        last = jnp.maximum(batch.query_starts[1:] - 1, 0)  # the head sees one row a request
        logits = model.rank_logits(hidden[last])
        picked = pick_tokens(logits, batch.kv_lens, sampling, greedy=greedy, truncated=truncated, comm=comm)
        return picked, attend.caches()

    def _decode(
        self,
        leaves: list[Array],
        state: DecodeState,
        block_tables: Int[Array, "R N"],
        sampling: SamplingState,
        *,
        greedy: bool,
        truncated: bool,
    ) -> DecodeState:
        """One token for every row; live rows are the first ones."""
        self.traces["decode"] += 1
        run: Callable[..., Any] = functools.partial(self._decode_rank, greedy=greedy, truncated=truncated)
        if (ranks := self.ranks) is not None:
            rows: Any = ranks.rows
            states = DecodeState(rows, rows, ranks.cache_specs)
            run = ranks.per_rank(run, (ranks.weight_specs(self._names), states, rows, sampling_specs(rows)), states)
        return run(leaves, state, block_tables, sampling)

    def _decode_rank(self, leaves, state, block_tables, sampling, *, greedy, truncated):
        model, comm = self._model(leaves), self._comm
        live = state.kv_lens > 0
        positions = state.kv_lens
        block_size = self._config.index_block_size
        pages = jnp.take_along_axis(block_tables, (positions // block_size)[:, None], axis=1)[:, 0]
        slots = jnp.where(live, pages * block_size + positions % block_size, -1)
        kv_lens = jnp.where(live, state.kv_lens + 1, 0)
        query_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(live, dtype=jnp.int32)])
        attend = TracedAttend(self._config, state.caches, Batch(block_tables, query_starts, kv_lens), slots)
        hidden = model.run_layers(model.embed(state.tokens, comm), positions, attend, comm)
        logits = model.rank_logits(hidden)
        picked = pick_tokens(logits, kv_lens, sampling, greedy=greedy, truncated=truncated, comm=comm)
        return DecodeState(picked, kv_lens, attend.caches())
