"""Prefill and mixed steps as segments: the layers through `segmented_jit`, the head as one executable."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from minimax_jax.attention import ATTENTION, BoundaryAttend, PagedAttention, StepLayout, step_layout
from minimax_jax.buckets import buckets_up_to
from minimax_jax.cache import PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.sampler import SamplingState, pick_tokens
from minimax_jax.model import merge_model
from minimax_jax.recent import RecentJits
from minimax_jax.segmented import segmented_jit

LEAST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class FlatStep:
    """The tokens of one step on the host, requests concatenated, nothing padded.

    Attributes:
      tokens, positions: [T] int32.
      layout: where they stand.
    """

    tokens: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    layout: StepLayout


class SegmentedPrefill:
    """Steps with host-side attention, for any mix of prompts and single tokens.

    Attributes:
      layers: the segmented function (weights, tokens, positions) -> hidden.
      attention: the executables behind its boundary.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        graphdef: nnx.GraphDef,
        names: tuple[str, ...],
        *,
        max_tokens: int,
        buckets: Sequence[int] | None = None,
        attention: PagedAttention | None = None,
        compiler_options: Mapping[str, Any] | None = None,
        dump_to: str | Path | None = None,
    ):
        """
        Args:
          max_tokens: of one step, the largest bucket; steps above it run at their exact size.
          buckets: of tokens; None for powers of two and three quarters of these.
          attention: the executables behind the boundary; None for ones with the best kernels.
          compiler_options, dump_to: as `segmented_jit` takes them.
        """
        self._config, self._graphdef, self._names = config, graphdef, names
        self.attention = PagedAttention(config) if attention is None else attention
        self.layers = segmented_jit(
            self._layers,
            boundaries=(ATTENTION,),
            buckets=buckets_up_to(max_tokens, LEAST_BUCKET) if buckets is None else buckets,
            rows=(1, 2),
            compiler_options=compiler_options,
            dump_to=dump_to,
        )

        def head() -> tuple[Any, ...]:
            return (jax.jit(functools.partial(self._pick), static_argnames=("greedy", "truncated")),)

        (self._head,) = head()
        self._exact_heads = RecentJits(head)

    def __call__(
        self,
        leaves: list[Array],
        pool: PagePool,
        step: FlatStep,
        sampling: SamplingState,
        *,
        greedy: bool,
        truncated: bool,
        eager: bool = False,
    ) -> Int[Array, "R"]:
        """Runs one step; the pool's pages are written in place.

        Args:
          eager: at the step's exact size, without capture.

        Returns:
          The token after the last one of each request, for as many rows as `sampling` has keys.

        Raises:
          StaleCaptureError: if the pool was resized or released meanwhile.
        """
        runtime = self.attention.step(pool, step.layout)
        run = self.layers.eager if eager else self.layers
        hidden = run(leaves, step.tokens, step.positions, runtime=runtime)
        rows = sampling.keys.shape[0]
        last, kv_lens = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        requests = len(step.layout.kv_lens)
        last[:requests] = np.maximum(step.layout.query_starts[1:] - 1, 0)
        kv_lens[:requests] = step.layout.kv_lens
        exact = eager or len(step.tokens) > self.layers.buckets[-1]
        head = self._exact_heads.get(hidden.shape[0])[0] if exact else self._head
        return head(leaves, hidden, last, kv_lens, sampling, greedy=greedy, truncated=truncated)

    def warm_up(self, leaves: list[Array], pool: PagePool, buckets: Sequence[int] | None = None) -> None:
        """Compiles and captures buckets, largest first, over tokens that write to no page.

        Attention is compiled for one request of a bucket's tokens only; more requests or pages a request compile
        their own when they are first met, and so does the head.
        """

        def example(num_tokens: int) -> tuple[tuple[Any, ...], Any]:
            block_size = self._config.index_block_size
            table = np.zeros((1, -(-num_tokens // block_size)), np.int32)
            layout = step_layout(table, np.array([num_tokens]), np.array([num_tokens]), block_size)
            layout = dataclasses.replace(layout, slots=np.full(num_tokens, -1, np.int32))
            tokens = np.zeros(num_tokens, np.int32)
            return (leaves, tokens, np.arange(num_tokens, dtype=np.int32)), self.attention.step(pool, layout)

        self.layers.warm_up(example, buckets)

    def _model(self, leaves: list[Array]) -> Any:
        return merge_model(self._graphdef, dict(zip(self._names, leaves, strict=True)))

    def _layers(self, leaves: list[Array], tokens: Int[Array, "T"], positions: Int[Array, "T"]) -> Float[Array, "T H"]:
        model = self._model(leaves)
        return model.run_layers(model.embed(tokens), positions, BoundaryAttend())

    def _pick(
        self,
        leaves: list[Array],
        hidden: Float[Array, "T H"],
        last: Int[Array, "R"],
        kv_lens: Int[Array, "R"],
        sampling: SamplingState,
        *,
        greedy: bool,
        truncated: bool,
    ) -> Int[Array, "R"]:
        logits = self._model(leaves).head(hidden[last])  # the head sees one row a request
        return pick_tokens(logits, kv_lens, sampling, greedy=greedy, truncated=truncated)
