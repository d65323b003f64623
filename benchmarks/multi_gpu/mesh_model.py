"""A model over a mesh with pages of noise, and its steps, compiled apart from the engine that plans them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minimax_jax import MiniMaxM3Config, MiniMaxM3ForCausalLM
from minimax_jax.attention import PagedAttention, step_layout
from minimax_jax.cache import PagePool
from minimax_jax.engine.pick_arrays import pick_parameters
from minimax_jax.engine.row_state import empty_rows
from minimax_jax.engine.scheduler import StepPlan
from minimax_jax.engine.segmented_prefill import FlatStep, SegmentedPrefill
from minimax_jax.engine.steps import PickFeatures, PickInputs, StepInputs
from minimax_jax.parallel import Ranks


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of the whole batch, which is dealt to the data ranks.

    Attributes:
      kind: "prefill", one request on each data rank, or "decode", one token of each request.
      size: tokens of a prefill step, requests of a decode step.
      past: tokens of each request's context before it.
    """

    kind: str
    size: int
    past: int

    def by_group(self, groups: int) -> list[tuple[int, int]]:
        """(requests, new tokens of each) of every data rank."""
        if self.kind == "decode":
            return [(self.size // groups + (group < self.size % groups), 1) for group in range(groups)]
        return [(1, -(-self.size // groups))] * groups

    def __str__(self) -> str:
        return f"{self.kind} {self.size} after {self.past}"


class MeshModel:
    """Weights over a mesh, a page pool of noise, and compiled steps.

    Attributes:
      ranks: what the model is spread over.
      model: weights and the engine's steps.
      pool: pages.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        ranks: Ranks,
        state: dict[str, Array],
        *,
        pages: int,
        rows: tuple[int, ...],
        width: int,
        dtype: Any = jnp.bfloat16,
    ):
        """
        Args:
          state: weights over `ranks`.
          pages: of each data rank.
          rows, width: requests of a data rank, and pages of a request, that block tables are padded to.
        """
        self.config, self.ranks, self.dtype = config, ranks, dtype
        self.model = MiniMaxM3ForCausalLM(config, state, ranks=ranks)
        self._local = ranks.layout.local_config
        self._state, self._pages, self._rows, self._width = state, pages, rows, width
        self.pool = self.new_pool()
        self.slots = empty_rows_of(ranks, max(rows), config.vocab_size)
        self.attention = PagedAttention(self._local, ranks=ranks, request_buckets=rows, page_buckets=(width,))

    def spread(self, **changes: Any) -> MeshModel:
        """The same weights in a layout with other options; this model's pool is released.

        Args:
          changes: of `ParallelConfig`, other than its three sizes.
        """
        self.pool.release()
        parallel = dataclasses.replace(self.ranks.layout.parallel, **changes)
        ranks = Ranks(self.config, parallel, list(self.ranks.mesh.devices.flat))
        return MeshModel(
            self.config, ranks, self._state, pages=self._pages, rows=self._rows, width=self._width, dtype=self.dtype
        )

    def new_pool(self) -> PagePool:
        """Pages of noise, so that selection has something to choose from."""
        pool = PagePool(self.config, self._pages, self.dtype, self.ranks.cache_placement)
        self.fill(pool)
        return pool

    def fill(self, pool: PagePool) -> None:
        """Noise in the place of what the pages hold, one array after the other."""
        with pool.borrow() as lent:
            leaves, tree = jax.tree.flatten(lent.caches)
            for number in range(len(leaves)):
                leaves[number] = _noise(leaves[number].sharding)(leaves[number], number)
            lent.caches = jax.tree.unflatten(tree, leaves)

    def steps_of(self, case: Case) -> list[FlatStep]:
        """A step for each data rank. Requests have pages of their own, as far as the pool goes.

        Raises:
          ValueError: if the pool holds no single request of this length.
        """
        return [self._step(*own, case.past, group) for group, own in enumerate(case.by_group(self.ranks.groups))]

    def _step(self, requests: int, new: int, past: int, seed: int) -> FlatStep:
        block_size = self.config.index_block_size
        pages = -(-(past + new) // block_size)
        if pages > self.pool.num_pages:
            raise ValueError(f"past = {past}: needs {pages} pages, the pool has {self.pool.num_pages}")
        random = np.random.default_rng(seed)
        if requests * pages <= self.pool.num_pages:
            tables = random.permutation(self.pool.num_pages)[: requests * pages].reshape(requests, pages)
        else:  # a page at most once in a request
            tables = np.stack([random.permutation(self.pool.num_pages)[:pages] for _ in range(requests)])
        layout = step_layout(tables, np.full(requests, new), np.full(requests, past + new), block_size)
        tokens = random.integers(0, self.config.vocab_size, requests * new)
        positions = np.tile(np.arange(past, past + new), requests)
        return FlatStep(tokens.astype(np.int32), positions.astype(np.int32), layout)

    def compiled(self, case: Case) -> WholeStep:
        """The step as one executable, compiled for its shapes; may be called on another thread."""
        return WholeStep(self, case)

    def segments(self, tokens: int) -> SegmentedPrefill:
        """Segments of one bucket."""
        return self.model.steps.segments((tokens,), self._rows, (self._width,))

    def run_segments(self, segments: SegmentedPrefill, steps: list[FlatStep]) -> jax.Array:
        """One step through segments, its host-side preparation included."""
        return segments.run_layers(self.model.leaves, self.pool, *steps)


class WholeStep:
    """One step as the engine runs it: all layers in one executable, then picking; operands are in place.

    Attributes:
      case: the step; inputs: its tokens on the devices.
    """

    def __init__(self, mesh_model: MeshModel, case: Case, executables: tuple[Any, Any] | None = None):
        """
        Args:
          executables: those of a step of the same shapes; None to compile them.
        """
        self.case, self._mesh_model = case, mesh_model
        ranks, groups = mesh_model.ranks, mesh_model.ranks.groups
        steps = mesh_model.steps_of(case)
        count = max(len(step.tokens) for step in steps)
        runtime = mesh_model.attention.step(mesh_model.pool, *(step.layout for step in steps))
        slots, batch = runtime.on_device(count)
        rows = batch.kv_lens.shape[0] // groups
        tokens, positions = np.zeros((2, groups, count), np.int32)
        last, kv_lens = np.zeros((2, groups, rows), np.int32)
        for group, step in enumerate(steps):
            tokens[group, : len(step.tokens)], positions[group, : len(step.tokens)] = step.tokens, step.positions
            requests = len(step.layout.kv_lens)
            last[group, :requests], kv_lens[group, :requests] = step.layout.query_starts[1:] - 1, step.layout.kv_lens
        picking = pick_parameters([StepPlan()] * groups, rows, mesh_model.config.vocab_size, ())
        own = np.tile(np.arange(rows, dtype=np.int32), groups)
        host = (
            [tokens.reshape(-1), np.full(groups * count, -1, np.int32), positions.reshape(-1), last.reshape(-1)],
            [kv_lens.reshape(-1), own, picking],
        )
        (tokens, sources, positions, last), (kv_lens, own, (sampling, adjustments)) = ranks.place(
            host, jax.tree.map(lambda _: ranks.rows, host)
        )
        self.inputs = StepInputs(tokens, sources, positions, slots, batch, last)
        self._picking = PickInputs(kv_lens, own, own, sampling, adjustments)
        model = mesh_model.model
        if executables is None:
            leaves, caches, slots = jax.tree.map(_shape, (model.leaves, mesh_model.pool.caches, mesh_model.slots))
            layers = model.steps.layers.lower(leaves, caches, slots.last_tokens, self.inputs).compile()
            hidden = jax.ShapeDtypeStruct(
                (groups * rows, mesh_model.config.hidden_size), mesh_model.dtype, sharding=layers.output_shardings[1]
            )
            pick = model.steps.pick.lower(leaves, slots, hidden, self._picking, features=PickFeatures()).compile()
            executables = layers, pick
        self._executables = executables

    def after(self, past: int) -> WholeStep:
        """The same executables after another context."""
        return WholeStep(self._mesh_model, dataclasses.replace(self.case, past=past), self._executables)

    def run_layers(self) -> jax.Array:
        """Hidden states of each request's last token."""
        mesh_model = self._mesh_model
        with mesh_model.pool.borrow() as lent:
            _, last, lent.caches = self._executables[0](
                mesh_model.model.leaves, lent.caches, mesh_model.slots.last_tokens, self.inputs
            )
        return last

    def __call__(self) -> jax.Array:
        """The tokens that follow, greedily."""
        mesh_model = self._mesh_model
        picked, _, mesh_model.slots = self._executables[1](
            mesh_model.model.leaves, mesh_model.slots, self.run_layers(), self._picking
        )
        return picked


def empty_rows_of(ranks: Ranks, rows: int, vocab_size: int) -> Any:
    """The engine's state of `rows` slots on each data rank."""
    state = empty_rows(rows * ranks.groups, vocab_size)
    return ranks.place(state, jax.tree.map(lambda _: ranks.rows, state))


def _shape(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


@functools.lru_cache(maxsize=8)
def _noise(sharding: jax.sharding.Sharding) -> Any:
    def draw(old: Array, seed: Array) -> Array:
        return jax.random.normal(jax.random.key(seed), old.shape, jnp.float32).astype(old.dtype)

    return jax.jit(draw, donate_argnums=0, out_shardings=sharding, keep_unused=True)
