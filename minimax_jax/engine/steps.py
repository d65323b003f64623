"""The compiled functions of the engine: layers over paged caches, picking tokens, edits of pages and rows.

Weights go in as flat leaves and are merged into modules inside the trace; caches and row state are donated, so they
are updated in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from minimax_jax.attention import PagedAttention, TracedAttend
from minimax_jax.buckets import buckets_up_to
from minimax_jax.cache import PagedCaches
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.decode_loop import run_decode_steps
from minimax_jax.engine.graph_options import GraphedLoop
from minimax_jax.engine.logprobs import TokenLogprobs, token_logprobs
from minimax_jax.engine.row_state import RowState, adjust_logits, begin_row, record_tokens
from minimax_jax.engine.sampler import pick_tokens
from minimax_jax.engine.segmented_prefill import LEAST_BUCKET, SegmentedPrefill
from minimax_jax.engine.step_inputs import BAD_LOGITS, PickFeatures, PickInputs, StepInputs
from minimax_jax.model import SINGLE_DEVICE, Comm, merge_model
from minimax_jax.parallel import Ranks
from minimax_jax.recent import RecentJits

MAX_PREFILL_TOKENS = 8192  # prompt tokens of one prefill step; longer prompts take several


class Steps:
    """Compiled steps of one model. Shapes decide what is compiled; nothing retraces for other values.

    The layers are one executable and picking is another one: what is asked of the sampler changes from batch to batch
    and must not compile sixty layers again.

    Attributes:
      traces: how often each function was traced, by name; steady serving leaves it unchanged.
      ranks: what the model is spread over, None for one device.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        graphdef: nnx.GraphDef,
        names: tuple[str, ...],
        ranks: Ranks | None = None,
        *,
        comm: Comm | None = None,
        quantized: Collection[str] = (),
    ):
        """
        Args:
          config, graphdef: of the whole model, or with `ranks` of one rank.
          ranks: what the model is spread over. Every rank of a data group gets the group's rows; see `Ranks`.
          comm: what modules get; None for that of `ranks`, or of one device.
          quantized: names of the weights that are `Mxfp8`.
        """
        self.traces = {"layers": 0, "pick": 0, "decode": 0}
        self.ranks = ranks
        self._comm = comm or (SINGLE_DEVICE if ranks is None else ranks.comm)
        self._config, self._graphdef, self._names = config, graphdef, names
        self._quantized = frozenset(quantized)
        self.layers = jax.jit(self._layers, donate_argnums=(1,))
        self.score = jax.jit(self._score, static_argnames="num_logprobs")
        self.edit_pages = jax.jit(self._edit_pages, donate_argnums=(0,))
        self.begin_row = jax.jit(self._begin_row, donate_argnums=(0,))

        self.pick = jax.jit(self._pick, donate_argnums=(1,), static_argnames="features")
        self.decode = self.decoding(graphs=False)
        self.take = jax.jit(self._take_rows())
        self._exact_takes = RecentJits(lambda: (jax.jit(self._take_rows()),))

    def decoding(self, *, graphs: bool) -> Callable[..., Any]:
        """Several decode steps as one executable: (caches, state, leaves, first, rows, counts, features, num_steps).

        Args:
          graphs: whether on a GPU the loop is to lie in a CUDA graph.
        """
        return GraphedLoop(
            lambda options: jax.jit(
                self._decode,
                donate_argnums=(0, 1),
                static_argnames=("features", "num_steps"),
                compiler_options=options,
            ),
            graphs=graphs,
        )

    @functools.cached_property
    def segmented(self) -> SegmentedPrefill:
        """Prompts and mixed steps as segments; built when first asked for."""
        return self.segments(buckets_up_to(MAX_PREFILL_TOKENS, LEAST_BUCKET))

    def segments(
        self,
        buckets: tuple[int, ...],
        request_buckets: tuple[int, ...] | None = None,
        page_buckets: tuple[int, ...] | None = None,
    ) -> SegmentedPrefill:
        """The same, for buckets of one's own, of attention too (see `PagedAttention`)."""
        attention = PagedAttention(
            self._config, ranks=self.ranks, request_buckets=request_buckets, page_buckets=page_buckets
        )
        return SegmentedPrefill(
            self._config, self._graphdef, self._names,
            max_tokens=buckets[-1], buckets=buckets, attention=attention, ranks=self.ranks, comm=self._comm,
            quantized=self._quantized,
        )  # fmt: skip

    def _take_rows(self) -> Callable[[Array, Array], Array]:
        """A function of its own, so that what was compiled for it goes with it."""
        return self._per_rank(functools.partial(_take), (self._rows, self._rows), self._rows)

    def take_exact(self, num_tokens: int) -> Callable[[Array, Array], Array]:
        """`take` for `num_tokens` hidden states, a size that may be one of endlessly many; the latest few are kept."""
        return self._exact_takes.get(num_tokens)[0]

    def _model(self, leaves: list[Array]):
        return merge_model(self._graphdef, dict(zip(self._names, leaves, strict=True)))

    def _per_rank(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return fn if self.ranks is None else self.ranks.per_rank(fn, in_specs, out_specs)

    @property
    def _weights(self) -> Any:
        return None if self.ranks is None else self.ranks.weight_specs(self._names, self._quantized)

    @property
    def _caches(self) -> Any:
        return None if self.ranks is None else self.ranks.cache_specs

    @property
    def _rows(self) -> Any:
        return None if self.ranks is None else self.ranks.rows

    def _layers(
        self, leaves: list[Array], caches: PagedCaches, last_tokens: Int[Array, "S"], step: StepInputs
    ) -> tuple[Float[Array, "T H"], Float[Array, "R H"], PagedCaches]:
        """Runs flat tokens, of prompts and answers alike, through all layers.

        Returns:
          (hidden states, those of each row's last token, caches)
        """
        self.traces["layers"] += 1
        run = self._per_rank(
            self._layers_rank,
            (self._weights, self._caches, self._rows, self._rows),
            (self._rows, self._rows, self._caches),
        )
        return run(leaves, caches, last_tokens, step)

    def _layers_rank(self, leaves, caches, last_tokens, step):
        model, comm = self._model(leaves), self._comm
        tokens = jnp.where(step.sources < 0, step.tokens, last_tokens[step.sources])
        split = None if self.ranks is None else self.ranks.index_split
        attend = TracedAttend(self._config, caches, step.batch, step.slots, index_split=split)
        hidden = model.run_layers(model.embed(tokens, comm), step.positions, attend, comm)
        return hidden, _take(hidden, step.last), attend.caches()

    def _pick(
        self,
        leaves: list[Array],
        state: RowState,
        last: Float[Array, "R H"],
        rows: PickInputs,
        *,
        features: PickFeatures,
    ) -> tuple[Int[Array, "R"], TokenLogprobs | None, RowState]:
        """The next token of each row, `BAD_LOGITS` where there is none to choose, and what was asked about it.

        Args:
          last: the rows' hidden states, of which the head makes logits.
        """
        self.traces["pick"] += 1
        run = self._per_rank(
            functools.partial(self._pick_rank, features=features),
            (self._weights, self._rows, self._rows, self._rows),
            (self._rows, None if features.num_logprobs is None else self._rows, self._rows),
        )
        return run(leaves, state, last, rows)

    def _decode(
        self,
        caches: PagedCaches,
        state: RowState,
        leaves: list[Array],
        first: StepInputs,
        rows: PickInputs,
        counts: Int[Array, "R"],
        *,
        features: PickFeatures,
        num_steps: int,
    ) -> tuple[Int[Array, "R steps"], TokenLogprobs | None, RowState, PagedCaches]:
        """Several steps of one token a row; see `run_decode_steps`."""
        self.traces["decode"] += 1

        def run_rank(leaves, caches, state, first, rows, counts):
            return run_decode_steps(
                functools.partial(self._layers_rank, leaves),
                functools.partial(self._pick_rank, leaves, features=features),
                caches, state, first, rows, counts,
                num_steps=num_steps, page_size=self._config.index_block_size, num_logprobs=features.num_logprobs,
            )  # fmt: skip

        given = (self._weights, self._caches, self._rows, self._rows, self._rows, self._rows)
        results = (self._rows, None if features.num_logprobs is None else self._rows, self._rows, self._caches)
        return self._per_rank(run_rank, given, results)(leaves, caches, state, first, rows, counts)

    def _pick_rank(self, leaves, state, last, rows, *, features):
        model, comm = self._model(leaves), self._comm
        logits = model.rank_logits(last)
        bad = ~jnp.isfinite(last).all(axis=-1)  # every rank has these
        adjusted = features.penalized or features.held or rows.adjustments.bias_ids.shape[1] > 0
        if adjusted or features.num_logprobs is not None:
            logits, comm = comm.gather_vocab(logits), SINGLE_DEVICE
        if comm is SINGLE_DEVICE:
            bad |= ~jnp.isfinite(logits).all(axis=-1)
        own = logits
        if adjusted:
            logits = adjust_logits(
                logits, state, rows.slots, rows.positions, rows.adjustments,
                penalized=features.penalized, held=features.held,
            )  # fmt: skip
        picked = pick_tokens(
            logits, rows.positions, rows.sampling, greedy=features.greedy, truncated=features.truncated, comm=comm
        )
        logprobs = None if features.num_logprobs is None else token_logprobs(own, picked, features.num_logprobs)
        tokens = jnp.where(bad, BAD_LOGITS, picked)
        return tokens, logprobs, record_tokens(state, rows.writes, tokens, counted=features.penalized)

    def _score(
        self,
        leaves: list[Array],
        hidden: Float[Array, "T H"],
        rows: Int[Array, "R"],
        tokens: Int[Array, "R"],
        *,
        num_logprobs: int,
    ) -> TokenLogprobs:
        """Log probabilities of given tokens after some of the flat tokens."""

        def run(leaves, hidden, rows, tokens):
            logits = self._comm.gather_vocab(self._model(leaves).rank_logits(hidden[rows]))
            return token_logprobs(logits, tokens, num_logprobs)

        specs = (self._weights, self._rows, self._rows, self._rows)
        return self._per_rank(run, specs, self._rows)(leaves, hidden, rows, tokens)

    def _edit_pages(self, caches: PagedCaches, sources: Int[Array, "E"], targets: Int[Array, "E"]) -> PagedCaches:
        """Copies pages in every layer; a source of -1 clears its target, a target of P or more is none."""

        def edit(pool: Array, sources: Array, targets: Array) -> Array:
            clear = (sources < 0).reshape(-1, *(1,) * (pool.ndim - 1))
            values = jnp.where(clear, 0, pool[jnp.maximum(sources, 0)])
            return pool.at[targets].set(values.astype(pool.dtype), mode="drop")

        def run(caches, sources, targets):
            return jax.tree.map(lambda pool: edit(pool, sources, targets), caches)

        return self._per_rank(run, (self._caches, self._rows, self._rows), self._caches)(caches, sources, targets)

    def _begin_row(
        self, state: RowState, slot: Int[Array, "1"], prompt: Int[Array, "L"], output: Int[Array, "M"]
    ) -> RowState:
        return self._per_rank(begin_row, (self._rows,) * 4, self._rows)(state, slot, prompt, output)


def _take(hidden: Float[Array, "T H"], last: Int[Array, "R"]) -> Float[Array, "R H"]:
    return hidden[last]
