"""The layers of prefill and mixed steps as segments, through `segmented_jit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from minimax_jax.attention import ATTENTION, BoundaryAttend, PagedAttention, StepLayout, step_layout
from minimax_jax.buckets import buckets_up_to
from minimax_jax.cache import PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model import SINGLE_DEVICE, Comm, merge_model
from minimax_jax.parallel import Ranks
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
        ranks: Ranks | None = None,
        comm: Comm | None = None,
        quantized: Collection[str] = (),
        compiler_options: Mapping[str, Any] | None = None,
        dump_to: str | Path | None = None,
    ):
        """
        Args:
          config, graphdef: of the whole model, or with `ranks` of one rank.
          max_tokens: of one step, the largest bucket; steps above it run at their exact size.
          buckets: of tokens; None for powers of two and three quarters of these.
          attention: the executables behind the boundary, over the same ranks; None for ones with the best kernels.
          ranks: what the model is spread over, None for one device.
          comm: what modules get; None for that of `ranks`, or of one device.
          quantized: names of the weights that are `Mxfp8`.
          compiler_options, dump_to: as `segmented_jit` takes them.
        """
        self._config, self._graphdef, self._names = config, graphdef, names
        self._groups = 1 if ranks is None else ranks.groups
        self._comm = comm or (SINGLE_DEVICE if ranks is None else ranks.comm)
        self.attention = PagedAttention(config, ranks=ranks) if attention is None else attention
        over: dict[str, Any] = {}
        if ranks is not None:
            specs = (ranks.weight_specs(names, quantized), ranks.columns, ranks.columns)
            over = {"mesh": ranks.mesh, "in_specs": specs, "out_specs": ranks.rows}
        self.layers = segmented_jit(
            self._layers,
            boundaries=(ATTENTION,),
            buckets=buckets_up_to(max_tokens, LEAST_BUCKET) if buckets is None else buckets,
            rows=(1, 2),
            compiler_options=compiler_options,
            dump_to=dump_to,
            **over,
        )

    def run_layers(
        self, leaves: list[Array], pool: PagePool, *steps: FlatStep, eager: bool = False
    ) -> Float[Array, "T H"]:
        """Hidden states of one step, whose keys and values go to the pool's pages; those past its tokens are padding.

        Args:
          steps: its tokens; with data ranks one for each, perhaps without any. So are the hidden states, of as many
            rows for each.
          eager: at the step's exact size, without capture.

        Raises:
          StaleCaptureError: if the pool was resized or released meanwhile.
          ValueError: as `PagedAttention.step`.
        """
        runtime = self.attention.step(pool, *(step.layout for step in steps))
        live = max(len(step.tokens) for step in steps)
        rows = live if eager else self.layers.padded_rows(live)
        by_rank = [step.tokens for step in steps], [step.positions for step in steps]
        tokens, positions = runtime.send(rows, *by_rank, exact=eager or rows > self.layers.buckets[-1])
        if eager:
            return self.layers.eager(leaves, tokens, positions, runtime=runtime)
        return self.layers(leaves, tokens, positions, runtime=runtime, live=live)

    def warm_up(
        self,
        leaves: list[Array],
        pool: PagePool,
        buckets: Sequence[int] | None = None,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compiles and captures buckets, largest first, over tokens that write to no page.

        Attention is compiled for each of its `request_buckets` and `page_buckets` that a step of that size can have, so
        that no later step compiles any. Where these are not given, for one request of just so many tokens: other
        combinations are then compiled when they are first met.

        Args:
          buckets: of tokens; None for all.
          report: told (steps done, steps in all) after each.
        """
        wanted = sorted(self.layers.buckets if buckets is None else buckets, reverse=True)
        shapes = [(tokens, *shape) for tokens in wanted for shape in self._attention_shapes(tokens)]
        first = {tokens: shape for tokens, *shape in reversed(shapes)}
        steps = [
            (tokens, rows, pages)
            for tokens, rows, pages in shapes
            # the first shape of a bucket warms up and captures its segments too
            for _ in range(2 if first[tokens] == [rows, pages] else 1)
        ]
        for done, (tokens, requests, pages) in enumerate(steps, 1):
            self.run_layers(leaves, pool, *[self._idle_step(tokens, requests, pages)] * self._groups)
            if report is not None:
                report(done, len(steps))

    def _attention_shapes(self, num_tokens: int) -> list[tuple[int, int]]:
        """(requests, pages of the longest) that steps of a token bucket have."""
        block_size, attention = self._config.index_block_size, self.attention
        if attention.request_buckets is None or attention.page_buckets is None:
            return [(1, -(-num_tokens // block_size))]
        smaller = [size for size in self.layers.buckets if size < num_tokens]
        least = smaller[-1] + 1 if smaller else 1  # tokens of the smallest step in this bucket
        before = (0, *attention.request_buckets)
        return [
            (requests, pages)
            for requests, fewer in zip(attention.request_buckets, before, strict=False)
            for pages in attention.page_buckets
            if fewer < num_tokens and least <= requests * pages * block_size
        ]

    def _idle_step(self, num_tokens: int, num_requests: int, num_pages: int) -> FlatStep:
        """A step of the given size that reads page 0 and writes nothing."""
        block_size = self._config.index_block_size
        most = num_pages * block_size
        tokens = min(num_tokens, num_requests * most)
        counts = np.full(num_requests, tokens // num_requests)
        counts[: tokens % num_requests] += 1
        kv_lens = np.maximum(counts, 1)
        kv_lens[0] = most
        layout = step_layout(np.zeros((num_requests, num_pages), np.int32), counts, kv_lens, block_size)
        layout = dataclasses.replace(layout, slots=np.full(tokens, -1, np.int32))
        return FlatStep(np.zeros(tokens, np.int32), np.zeros(tokens, np.int32), layout)

    def _layers(self, leaves: list[Array], tokens: Int[Array, "T ..."], positions: Int[Array, "T ..."]) -> Array:
        """Hidden states [T, H]; over ranks, one rank's, whose tokens come as a column."""
        tokens, positions = tokens.reshape(-1), positions.reshape(-1)
        model = merge_model(self._graphdef, dict(zip(self._names, leaves, strict=True)))
        return model.run_layers(model.embed(tokens, self._comm), positions, BoundaryAttend(), self._comm)
