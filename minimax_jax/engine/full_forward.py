"""A forward pass with logits of many tokens, and hidden states: of whole prompts, or of more tokens of a context."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from minimax_jax.attention import ReferenceAttend, TracedAttend, step_layout
from minimax_jax.buckets import bucket
from minimax_jax.cache import PastKeyValues
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model import SINGLE_DEVICE, ForwardRecord, merge_model
from minimax_jax.parallel import Ranks
from minimax_kernels import Batch

_LEAST_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class FullOutput:
    """What a forward pass gives, rows of tokens in the order of the prompts.

    Attributes:
      logits: [K, V] float32 of the tokens that were asked for.
      hidden_states: [T, H] what each layer was given, and last the normalised result; empty unless asked for.
      router_logits: [T, E] float32 of each layer with experts; empty unless asked for.
    """

    logits: Float[Array, "K V"]
    hidden_states: tuple[Float[Array, "T H"], ...] = ()
    router_logits: tuple[Float[Array, "T E"], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens of a pass, data ranks one after the other, each padded to the same sizes.

    Attributes:
      tokens, positions: [T].
      head_rows: [K] rows to compute logits of, counted in each data rank.
      query_starts: [R + 1] a data rank.
      context: None without one; else block tables [R, N], kv_lens [R], and slots [T].
    """

    tokens: Any
    positions: Any
    head_rows: Any
    query_starts: Any
    context: Any


class FullForward:
    """The compiled forward of one model; see `Steps` for the arguments."""

    def __init__(
        self,
        config: MiniMaxM3Config,
        graphdef: nnx.GraphDef,
        names: tuple[str, ...],
        ranks: Ranks | None = None,
        quantized: Collection[str] = (),
    ):
        """
        Args:
          quantized: names of the weights that are `Mxfp8`.
        """
        self._config, self._graphdef, self._names, self._ranks = config, graphdef, names, ranks
        self._quantized = frozenset(quantized)
        self._run = jax.jit(self._pass, donate_argnums=1, static_argnames=("max_len", "hidden_states", "router_logits"))

    def __call__(
        self,
        leaves: list[Array],
        prompts: list[np.ndarray],
        *,
        positions: list[np.ndarray] | None = None,
        wanted: list[Bool[np.ndarray, "L"]] | None = None,
        past: PastKeyValues | None = None,
        hidden_states: bool = False,
        router_logits: bool = False,
    ) -> FullOutput:
        """Runs all tokens of the prompts, concatenated.

        Args:
          positions: of each prompt's tokens, for the rotary embedding; None counts on from the context.
          wanted: which of each prompt's tokens to give logits of; None for all.
          past: what stands before the prompts, one of them a row, perhaps empty. The new tokens are written to its
            pages; counting them is left to the caller.
          hidden_states, router_logits: whether to give these too.
        """
        groups = 1 if self._ranks is None else self._ranks.groups
        rows = bucket(-(-len(prompts) // groups)) if past is None else past.rows_per_group
        before = np.zeros(len(prompts), np.int32) if past is None else past.kv_lens
        if past is not None:
            past.reserve(before + [len(prompt) for prompt in prompts])
        if positions is None:
            positions = [np.arange(len(p), dtype=np.int32) + start for p, start in zip(prompts, before, strict=True)]
        if wanted is None:
            wanted = [np.ones(len(prompt), bool) for prompt in prompts]
        parts = [slice(first, first + rows) for first in range(0, rows * groups, rows)]
        size = bucket(max(sum(map(len, prompts[part])) for part in parts), _LEAST_TOKENS if past is None else 1)
        heads = bucket(max(sum(int(w.sum()) for w in wanted[part]) for part in parts))
        flat = [
            _flat_tokens(self._config, prompts, positions, wanted, before, past, part, (size, rows, heads))
            for part in parts
        ]
        step: Any = jax.tree.map(lambda *each: np.concatenate(each), *flat)
        if self._ranks is not None:
            step = self._ranks.place(step, jax.tree.map(lambda _: self._ranks.rows, step))  # type: ignore[union-attr]
        options = {"hidden_states": hidden_states, "router_logits": router_logits}
        if past is None:
            output, _ = self._run(leaves, None, step, max_len=bucket(max(map(len, prompts))), **options)
        else:
            with past.pool.borrow() as lent:
                output, lent.caches = self._run(leaves, lent.caches, step, max_len=0, **options)
        live = [sum(map(len, prompts[part])) for part in parts]
        asked = [sum(int(w.sum()) for w in wanted[part]) for part in parts]
        logits, hidden, router = output
        return FullOutput(
            _live_rows(logits, asked, heads),
            tuple(_live_rows(state, live, size) for state in hidden),
            tuple(_live_rows(state, live, size) for state in router),
        )

    def _pass(self, leaves, caches, step, *, max_len, hidden_states, router_logits):
        run: Callable[..., Any] = functools.partial(
            self._rank_pass, max_len=max_len, hidden_states=hidden_states, router_logits=router_logits
        )
        if (ranks := self._ranks) is not None:
            held = None if caches is None else ranks.cache_specs
            given = (ranks.weight_specs(self._names, self._quantized), held, ranks.rows)
            run = ranks.per_rank(run, given, ((ranks.logits, ranks.rows, ranks.rows), held))
        return run(leaves, caches, step)

    def _rank_pass(self, leaves, caches, step, *, max_len, hidden_states, router_logits):
        comm = SINGLE_DEVICE if self._ranks is None else self._ranks.comm
        model = merge_model(self._graphdef, dict(zip(self._names, leaves, strict=True)))
        if caches is None:
            attend: Any = ReferenceAttend(self._config, step.query_starts, step.tokens.shape[0], max_len, impl=None)
        else:
            block_tables, kv_lens, slots = step.context
            attend = TracedAttend(self._config, caches, Batch(block_tables, step.query_starts, kv_lens), slots)
        record = ForwardRecord()
        hidden = model.run_layers(model.embed(step.tokens, comm), step.positions, attend, comm, record)
        logits = model.rank_logits(hidden[step.head_rows])
        states = (*record.hidden_states[:-1], model.norm(hidden)) if hidden_states else ()
        router = tuple(record.router_logits) if router_logits else ()
        return (logits, states, router), None if caches is None else attend.caches()


def _flat_tokens(
    config: MiniMaxM3Config,
    prompts: list[np.ndarray],
    positions: list[np.ndarray],
    wanted: list[np.ndarray],
    before: Int[np.ndarray, "R"],
    past: PastKeyValues | None,
    part: slice,
    sizes: tuple[int, int, int],
) -> _Tokens:
    """One data rank's rows, `part`, padded to `sizes`: of tokens, rows, and tokens with logits."""
    size, rows, heads = sizes
    none = [np.zeros(0, np.int32)]
    lens = np.zeros(rows, np.int32)
    lens[: len(prompts[part])] = [len(prompt) for prompt in prompts[part]]
    starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    asked = np.flatnonzero(np.concatenate([*none, *wanted[part]]))
    context = None
    if past is not None:
        tables = np.zeros((rows, past.block_tables.shape[1]), np.int32)
        tables[: len(prompts[part])] = past.block_tables[part]
        kv_lens = lens.copy()
        kv_lens[: len(prompts[part])] += before[part]
        slots = step_layout(tables, lens, kv_lens, config.index_block_size).slots
        context = (tables, kv_lens, _padded(slots, size, -1))
    return _Tokens(
        _padded(np.concatenate([*none, *prompts[part]]), size),
        _padded(np.concatenate([*none, *positions[part]]), size),
        _padded(asked, heads),
        starts,
        context,
    )


def _padded(values: np.ndarray, size: int, fill: int = 0) -> Int[np.ndarray, "T"]:
    padded = np.full(size, fill, np.int32)
    padded[: len(values)] = values
    return padded


def _live_rows(array: Array, counts: Sequence[int], size: int) -> Array:
    """The first `counts[g]` of the `size` rows of each data rank."""
    if len(counts) == 1:
        return array[: counts[0]]
    return array[np.concatenate([np.arange(count) + group * size for group, count in enumerate(counts)])]
