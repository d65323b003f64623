"""Several decode steps in one executable: each step's tokens are the next one's input, and the host is not asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from minimax_jax.cache import PagedCaches
from minimax_jax.engine.logprobs import TokenLogprobs, empty_logprobs
from minimax_jax.engine.row_state import RowState
from minimax_jax.engine.step_inputs import PickInputs, StepInputs
from minimax_kernels import Batch

NO_TOKEN = -2  # in the place of a token of a row that has ended
_MOVING = ("last_tokens", "output_counts")  # of `RowState`: what steps change

Layers: TypeAlias = Callable[[PagedCaches, Array, StepInputs], tuple[Array, Array, PagedCaches]]
Pick: TypeAlias = Callable[[RowState, Array, PickInputs], tuple[Array, TokenLogprobs | None, RowState]]


def run_decode_steps(
    layers: Layers,
    pick: Pick,
    caches: PagedCaches,
    state: RowState,
    first: StepInputs,
    rows: PickInputs,
    counts: Int[Array, "R"],
    *,
    num_steps: int,
    page_size: int,
    num_logprobs: int | None,
) -> tuple[Int[Array, "R steps"], TokenLogprobs | None, RowState, PagedCaches]:
    """Runs `num_steps` steps of one token a row.

    A row takes part until it has `counts` tokens, has chosen one that ends it, or its logits were no numbers; from
    then on it writes to no page and to no state. So does a row from the start whose newest token, of a launch that the
    host has not read yet, had ended it.

    Args:
      layers, pick: one step's two halves, as `Steps` has them.
      first: the first step, one flat token a row; the tables hold pages for all of a row's tokens.
      rows: the first step's too; positions of later steps follow from it.
      counts: steps that a row takes at most, 0 for padding.
      page_size: tokens a page, B.
      num_logprobs: likeliest tokens that `pick` reports beside each token; None if it reports none.

    Returns:
      (tokens, `BAD_LOGITS` or `NO_TOKEN` in the place of some; what was asked about them, [R, steps, ...]; state;
      caches)
    """
    num_slots, tables = state.last_tokens.shape[0], first.batch.block_tables
    row_ids, never = jnp.arange(counts.shape[0]), jnp.full_like(first.sources, -1)
    pending = first.sources >= 0
    tokens = jnp.where(pending, state.last_tokens[first.sources], first.tokens)
    fixed = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name not in _MOVING}

    def one_step(number: Array, carry: Any) -> Any:
        caches, moving, tokens, alive, results = carry
        live = alive & (number < counts)
        moved = jnp.minimum(number, jnp.maximum(counts - 1, 0))  # a row that is done stays on its own pages
        positions = first.positions + moved
        slots = tables[row_ids, positions // page_size] * page_size + positions % page_size
        step = StepInputs(
            tokens=jnp.maximum(tokens, 0),
            sources=never,
            positions=positions,
            slots=jnp.where(live, slots, -1),
            batch=Batch(tables, first.batch.query_starts, first.batch.kv_lens + moved),
            last=first.last,
        )
        before = RowState(**moving, **fixed)
        _, hidden, caches = layers(caches, before.last_tokens, step)
        writes = jnp.where(live, rows.writes, num_slots)
        picking = dataclasses.replace(rows, positions=rows.positions + moved, writes=writes)
        picked, logprobs, after = pick(before, hidden, picking)
        alive = live & ~_ends(picked, rows.adjustments.ends)
        moving = {name: getattr(after, name) for name in _MOVING}
        found = jnp.where(live, picked, NO_TOKEN), logprobs
        return caches, moving, picked, alive, jax.tree.map(functools.partial(_put, number), results, found)

    moving = {name: getattr(state, name) for name in _MOVING}
    alive = ~(pending & _ends(tokens, rows.adjustments.ends))
    begin = caches, moving, tokens, alive
    shape = counts.shape[0], num_steps
    results = jnp.zeros(shape, jnp.int32), None if num_logprobs is None else empty_logprobs(shape, num_logprobs)
    caches, moving, _, _, results = jax.lax.fori_loop(0, num_steps, one_step, (*begin, results))
    return *results, RowState(**moving, **fixed), caches


def _put(number: Array, results: Array, found: Array) -> Array:
    """Puts what a step found in its place.

    A slice that is updated in place may become a copy whose address the loop counts up, which fits into no CUDA graph
    and keeps the whole loop out of it.
    """
    steps = jnp.arange(results.shape[1]).reshape(1, -1, *(1,) * (results.ndim - 2))
    return jnp.where(steps == number, found[:, None], results)


def _ends(tokens: Int[Array, "R"], ends: Int[Array, "R E"]) -> Array:
    """Whether a token ends its row: one of the row's own, or none at all."""
    return (tokens < 0) | (tokens[:, None] == ends).any(axis=1)
