"""Runs planned steps on the device, without waiting for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Rows
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minimax_jax.attention import StepLayout, check_pages, send_together, step_layout
from minimax_jax.buckets import bucket, padded_size
from minimax_jax.cache import PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.execution import mesh_execution, prefill_execution
from minimax_jax.engine.launched_step import LaunchedStep, PromptScores
from minimax_jax.engine.logprobs import TokenLogprobs
from minimax_jax.engine.pick_arrays import held_back, loop_features, pick_features, pick_parameters
from minimax_jax.engine.row_state import Adjustments, RowState, empty_rows
from minimax_jax.engine.runner_config import RunnerConfig
from minimax_jax.engine.sampler import SamplingState
from minimax_jax.engine.scheduler import PlannedRow, StepPlan
from minimax_jax.engine.segmented_prefill import FlatStep, SegmentedPrefill
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.step_arrays import SlotTables, StepArrays, StepShape, step_arrays
from minimax_jax.engine.step_inputs import EVERYTHING, GREEDY, SAMPLED, PickFeatures, PickInputs, StepInputs
from minimax_jax.engine.steps import Steps
from minimax_kernels import Batch

_SCORED_ROWS = 256  # prompt tokens whose logits exist at once
_EDITED_PAGES = 8  # the least number of page edits that is compiled for


class StepRunner:
    """The device's side of the engine: weights, page pool, state of running rows, and how steps are launched.

    Attributes:
      pool: the caches.
      config: how steps run.
      num_slots: rows that the state holds.
      spans_processes: whether other processes run these steps as well.
    """

    def __init__(
        self,
        steps: Steps,
        leaves: list[Array],
        model: MiniMaxM3Config,
        pool: PagePool,
        config: RunnerConfig,
        *,
        end_ids: Rows[int] = (),
        max_pages: int | None = None,
        segmented: SegmentedPrefill | None = None,
    ):
        """
        Args:
          model: of the whole model.
          end_ids: end-of-text tokens, which `min_tokens` keeps away.
          max_pages: of one sequence; None for all of the pool's.
          segmented: prompts as segments; None for those of `steps`.
        """
        ranks = steps.ranks
        self.spans_processes = ranks is not None and jax.process_count() > 1
        self._execution = config.execution if ranks is None else mesh_execution(config.execution)
        self._steps, self._leaves, self._model, self.pool, self.config = steps, leaves, model, pool, config
        self._segmented, self._end_ids = segmented, tuple(end_ids)
        self._page_size, self._platform = model.index_block_size, next(iter(leaves[0].devices())).platform
        self._groups = 1 if ranks is None else ranks.groups
        self.num_slots = config.max_batch_size
        width = max(max_pages or pool.num_pages, *(config.page_buckets or (1,)))
        self._tables = [
            SlotTables(self.num_slots, padded_size(width, config.page_buckets)) for _ in range(self._groups)
        ]
        self._state = self._empty_state()
        self._parameters: tuple[Any, ...] | None = None  # of the latest step
        self._life = pool.epoch.value  # of the pool, in which the tables fit
        graphs = config.graph_loops and self._platform == "gpu"
        self._decode = steps.decoding(graphs=True) if graphs else steps.decode

    @property
    def decodes_whole(self) -> bool:
        """Whether steps of one token a row are one executable, of which a loop can be made."""
        return self._choose("decode", 1) == "whole"

    def needs_known_tokens(self, plans: Rows[StepPlan]) -> bool:
        """Whether the plans' pending tokens must be read before the launch: segments take tokens from the host."""
        return self._how(plans)[1] != "whole"

    def _how(self, plans: Rows[StepPlan]) -> tuple[str, str]:
        """(kind, execution) of a step."""
        kind = "decode" if all(row.num_tokens == 1 for plan in plans for row in plan.rows) else "prefill"
        return kind, self._choose(kind, max(plan.num_tokens for plan in plans))

    def _choose(self, kind: str, num_tokens: int) -> str:
        if self._execution == "eager":
            return "eager"
        if kind == "decode":
            return "whole"
        return prefill_execution(self._execution, num_tokens, self._model.num_hidden_layers, self._platform)

    def _shape(self, plans: Rows[StepPlan], kind: str) -> StepShape:
        count = max(len(plan.rows) for plan in plans)
        if kind == "decode":
            rows = tokens = self.config.rows(count) if self.config.pad_batches else count
        else:
            rows, tokens = self.config.mixed_rows(count), self.config.tokens(max(plan.num_tokens for plan in plans))
        end = max(row.end for plan in plans for row in plan.rows)
        return StepShape(tokens, rows, self.config.pages(-(-end // self._page_size)))

    def launch(self, plans: Rows[StepPlan]) -> LaunchedStep:
        """Starts a step, or several, a plan for each data rank, at least one of which has rows.

        Raises:
          jax.errors.JaxRuntimeError: from the device; the caches may be lost then.
          ValueError: if the pool lost pages that are in use.
        """
        kind, how = self._how(plans)
        shape = self._shape(plans, kind)
        arrays = step_arrays(plans, self._tables, shape, page_size=self._page_size, num_slots=self.num_slots)
        self._begin_rows(plans)
        if any(plan.copies for plan in plans):
            self.copy_pages([plan.copies for plan in plans])
        picking = self._pick_parameters(plans, shape.rows)
        scores: tuple[PromptScores, ...] = ()
        if plans[0].num_steps > 1:
            tokens, logprobs = self._run_steps(arrays, plans[0].num_steps, *picking)
        else:
            if how == "whole":
                sent = self._send(arrays)
                hidden, last = self._run_whole(arrays, sent)
            else:
                sent = arrays
                hidden, last = self._run_segments(plans, arrays, eager=how == "eager")
            tokens, logprobs = self._pick(sent, last, *picking)
            scores = self._score_prompts(plans, shape, hidden)
        jax.tree.map(_start_copy, (tokens, logprobs, [score.scores for score in scores]))
        return LaunchedStep(tuple(plans), shape.rows, tokens, logprobs, scores, kind, how)

    def warm_up(
        self, kind: str, num_tokens: int, num_rows: int, num_pages: int, *, loops: Rows[PickFeatures] = (SAMPLED,)
    ) -> None:
        """Compiles and runs one step of the largest context that `num_pages` hold, which writes to no page.

        Args:
          kind: "prefill", with one token of each sequence and what is left of the first, or "decode".
          loops: where launches take several decode steps, those of `LOOP_FEATURES` whose loops run as well.
        """
        shape = StepShape(num_tokens if kind == "prefill" else num_rows, num_rows, num_pages)
        groups = self._groups
        live = min(num_rows, shape.tokens)
        counts = (np.arange(num_rows) < live).astype(np.int32)
        counts[0] += shape.tokens - live
        ends = np.cumsum(counts, dtype=np.int32)
        contexts = np.where(counts > 0, num_pages * self._page_size, 0).astype(np.int32)
        at = np.repeat(np.arange(num_rows), counts)
        positions = np.arange(shape.tokens, dtype=np.int32) - ends[at] + contexts[at]
        none, zeros = np.full(shape.tokens, -1, np.int32), np.zeros(shape.tokens, np.int32)
        tables, rows = np.zeros((num_rows, num_pages), np.int32), np.zeros(num_rows, np.int32)
        starts = np.concatenate([rows[:1], ends])
        fields = (zeros, none, positions, none, tables, starts, contexts, ends - 1, rows, rows + self.num_slots, rows)
        arrays = StepArrays(*(np.concatenate([field] * groups) for field in fields))
        how = self._choose(kind, shape.tokens)
        if how == "whole":
            sent = self._send(arrays)
            _, last = self._run_whole(arrays, sent)
        else:
            layout = StepLayout(tables[:live], starts[: live + 1], contexts[:live], none)
            _, last = self._run_flat([FlatStep(zeros, positions, layout)] * groups, arrays.last, eager=how == "eager")
        nobody = [StepPlan()] * groups
        parameters = self._place(pick_parameters(nobody, num_rows, self._model.vocab_size, ()), keep=True)
        for features in (GREEDY, PickFeatures(greedy=False), SAMPLED):
            picked = self._pick(arrays, last, features, *parameters)
        jax.block_until_ready(picked)
        if kind == "decode" and how == "whole" and self.config.steps_per_launch > 1:
            for features in loops:
                wide = features == EVERYTHING
                parameters = pick_parameters(nobody, num_rows, self._model.vocab_size, (), widest=wide)
                picking = features, *self._place(parameters, keep=True)
                picked = self._run_steps(arrays, self.config.steps_per_launch, *picking)
                jax.block_until_ready(picked)  # so that memory holds one of them at a time

    def fetch(self, step: LaunchedStep) -> tuple[np.ndarray, TokenLogprobs | None]:
        """Waits for a launch's tokens [data rank, row, step] and what was asked about them, on the host."""
        by_step = (self._groups, step.num_rows, step.plans[0].num_steps)
        tokens = self._fetched(step.tokens).reshape(by_step)
        if step.logprobs is None:
            return tokens, None
        inner = 1 if step.plans[0].num_steps == 1 else 2
        return tokens, jax.tree.map(lambda x: self._fetched(x).reshape(*by_step, *x.shape[inner:]), step.logprobs)

    def fetch_scores(self, scores: PromptScores) -> TokenLogprobs:
        """A prompt's log probabilities on the host."""
        return jax.tree.map(self._fetched, scores.scores)

    def copy_pages(self, copies: Rows[Rows[tuple[int, int]]]) -> None:
        """Copies (page, copy) pairs of each data rank, in every layer."""
        self._edit([[(source, target) for source, target in own] for own in copies])

    def clear_pages(self, pages: Rows[Rows[int]]) -> None:
        """Zeroes pages of each data rank, so that NaN does not stay where logits were none.

        Nobody's result depends on it: attention masks what lies behind a row's own tokens, whatever it is. So the pages
        of a row that ended while a step computed it stay as they are; by then they may belong to others.
        """
        if any(pages):
            self._edit([[(-1, page) for page in own] for own in pages])

    def reset_rows(self) -> None:
        """Forgets all rows, after a failed step may have consumed them."""
        self._state = self._empty_state()
        self._parameters = None

    def _empty_state(self) -> RowState:
        state = empty_rows(self.num_slots * self._groups, self._model.vocab_size)
        if self._steps.ranks is not None:
            return self._place(state)
        # committed to the device, as it comes back from steps: else the first steps compile twice
        return jax.device_put(state, self._leaves[0].sharding)

    def _edit(self, edits: list[list[tuple[int, int]]]) -> None:
        size = bucket(max(map(len, edits)), _EDITED_PAGES)
        sources, targets = np.full((2, self._groups, size), self.pool.num_pages, np.int32)
        sources[:] = 0
        for group, own in enumerate(edits):
            for number, (source, target) in enumerate(own):
                sources[group, number], targets[group, number] = source, target
        with self.pool.borrow() as lent:
            lent.caches = self._steps.edit_pages(lent.caches, *self._place((sources.reshape(-1), targets.reshape(-1))))

    def _begin_rows(self, plans: Rows[StepPlan]) -> None:
        for group, plan in enumerate(plans):
            for row in plan.rows:
                if row.begins and row.sequence.params.penalizes:
                    self._begin_row(group, row.sequence)

    def _begin_row(self, group: int, sequence: Sequence) -> None:
        """Counts a sequence's tokens once more, when it starts or starts again."""
        slots = np.full((self._groups, 1), self.num_slots, np.int32)
        slots[group] = sequence.slot
        vocab_size = self._model.vocab_size
        prompt = np.full((self._groups, bucket(sequence.num_prompt, 64)), vocab_size, np.int32)
        prompt[group, : sequence.num_prompt] = sequence.known[: sequence.num_prompt]
        output = np.full((self._groups, bucket(len(sequence.output), 64)), vocab_size, np.int32)
        output[group, : len(sequence.output)] = sequence.output
        flat = self._place((slots.reshape(-1), prompt.reshape(-1), output.reshape(-1)))
        self._state = self._steps.begin_row(self._state, *flat)

    def _send(self, arrays: StepArrays) -> StepArrays:
        """The arrays on one device in one transfer; ranks place their own."""
        if self._steps.ranks is not None:
            return arrays
        names = [field.name for field in dataclasses.fields(arrays)]
        sent: Any = send_together([getattr(arrays, name) for name in names])
        return StepArrays(*sent)

    def _run_whole(self, arrays: StepArrays, sent: StepArrays) -> tuple[Float[Array, "T H"], Float[Array, "R H"]]:
        """(hidden states, those of each row's last token); `sent` are the arrays as `_send` gives them."""
        step = self._place(_step_inputs(sent))
        with self.pool.borrow() as lent:
            self._check_pages(arrays)
            hidden, last, lent.caches = self._steps.layers(self._leaves, lent.caches, self._state.last_tokens, step)
        return hidden, last

    def _run_steps(
        self,
        arrays: StepArrays,
        num_steps: int,
        features: PickFeatures,
        sampling: SamplingState,
        adjustments: Adjustments,
    ) -> tuple[Int[Array, "R steps"], TokenLogprobs | None]:
        """Several decode steps in one executable, of which `arrays` are the first."""
        sent = self._send(arrays)
        placed = self._place((_step_inputs(sent), sent.num_chosen, sent.kv_lens, sent.row_slots, sent.writes))
        first, counts, positions, slots, writes = placed
        rows = PickInputs(positions, slots, writes, sampling, adjustments)
        with self.pool.borrow() as lent:
            self._check_pages(arrays)
            tokens, logprobs, self._state, lent.caches = self._decode(
                lent.caches, self._state, self._leaves, first, rows, counts, features=features, num_steps=num_steps
            )
        return tokens, logprobs

    def _check_pages(self, arrays: StepArrays) -> None:
        """Raises ValueError for pages that a pool which was resized meanwhile has no more."""
        if self._life != self.pool.epoch.value:
            ends = arrays.kv_lens + np.maximum(arrays.num_chosen - 1, 0)
            held = np.arange(arrays.block_tables.shape[1]) < -(-ends[:, None] // self._page_size)
            check_pages(arrays.block_tables[held], self.pool.num_pages)
            self._life = self.pool.epoch.value

    def _run_segments(
        self, plans: Rows[StepPlan], arrays: StepArrays, *, eager: bool
    ) -> tuple[Float[Array, "T H"], Float[Array, "R H"]]:
        """Through segments, which pad for themselves and want to know all tokens."""
        assert (arrays.sources < 0).all()
        groups = self._groups
        tokens, positions, kv_lens = (x.reshape(groups, -1) for x in (arrays.tokens, arrays.positions, arrays.kv_lens))
        tables = arrays.block_tables.reshape(groups, -1, arrays.block_tables.shape[1])
        steps = []
        for group, plan in enumerate(plans):
            rows, total = len(plan.rows), plan.num_tokens
            counts = np.array([row.num_tokens for row in plan.rows], np.int32)
            layout = step_layout(tables[group, :rows], counts, kv_lens[group, :rows], self._page_size)
            steps.append(FlatStep(tokens[group, :total], positions[group, :total], layout))
        return self._run_flat(steps, arrays.last, eager=eager)

    def _run_flat(
        self, steps: list[FlatStep], last: Int[np.ndarray, "R"], *, eager: bool
    ) -> tuple[Float[Array, "T H"], Float[Array, "R H"]]:
        """One step, by data rank."""
        segments = self._steps.segmented if self._segmented is None else self._segmented
        hidden = segments.run_layers(self._leaves, self.pool, *steps, eager=eager)
        known = not eager and hidden.shape[0] // self._groups in segments.layers.buckets
        take = self._steps.take if known else self._steps.take_exact(hidden.shape[0])
        return hidden, take(hidden, self._place(last))

    def _pick(
        self,
        arrays: StepArrays,
        last: Float[Array, "R H"],
        features: PickFeatures,
        sampling: SamplingState,
        adjustments: Adjustments,
    ) -> tuple[Int[Array, "R"], TokenLogprobs | None]:
        positions, slots, writes = self._place((arrays.kv_lens, arrays.row_slots, arrays.writes))
        rows = PickInputs(positions, slots, writes, sampling, adjustments)
        tokens, logprobs, self._state = self._steps.pick(self._leaves, self._state, last, rows, features=features)
        return tokens, logprobs

    def _pick_parameters(self, plans: Rows[StepPlan], num_rows: int) -> tuple[PickFeatures, SamplingState, Adjustments]:
        """As arrays on the device; those of the last step where the same sequences go on."""
        key = num_rows, plans[0].num_steps > 1, [[row.sequence for row in plan.rows] for plan in plans]
        if self._parameters is not None and self._parameters[0] == key:
            return self._parameters[1]
        flat = [row.sequence for plan in plans for row in plan.rows]
        features = loop_features(flat, self._end_ids) if plans[0].num_steps > 1 else pick_features(flat)
        wide = plans[0].num_steps > 1 and features == EVERYTHING
        state, changes = pick_parameters(plans, num_rows, self._model.vocab_size, self._end_ids, widest=wide)
        result = features, self._place(state, keep=True), self._place(changes, keep=True)
        self._parameters = None if any(map(held_back, flat)) else (key, result)
        return result

    def _score_prompts(
        self, plans: Rows[StepPlan], shape: StepShape, hidden: Float[Array, "T H"]
    ) -> tuple[PromptScores, ...]:
        """Log probabilities of the prompt tokens that follow this step's, where somebody asked."""
        found: list[PromptScores] = []
        for group, plan in enumerate(plans):
            end = 0
            for row in plan.rows:
                end += row.num_tokens
                asked = row.sequence.params.prompt_logprobs
                last = min(row.start + row.num_tokens, row.sequence.num_prompt - 1)
                if asked is None or row.sequence.parent is not None or row.start >= last:
                    continue
                for first in range(row.start, last, _SCORED_ROWS):
                    count = min(_SCORED_ROWS, last - first)
                    found.append(self._score(group, row, first, count, end - row.num_tokens, hidden, bucket(asked)))
        return tuple(found)

    def _score(
        self, group: int, row: PlannedRow, first: int, count: int, flat: int, hidden: Array, num_logprobs: int
    ) -> PromptScores:
        rows, tokens = np.zeros((2, self._groups, _SCORED_ROWS), np.int32)
        rows[group, :count] = flat + first - row.start + np.arange(count)
        tokens[group, :count] = row.sequence.known[first + 1 : first + 1 + count]
        flat_rows, flat_tokens = self._place((rows.reshape(-1), tokens.reshape(-1)))
        scores = self._steps.score(self._leaves, hidden, flat_rows, flat_tokens, num_logprobs=num_logprobs)
        own = jax.tree.map(lambda x: x[group * _SCORED_ROWS : (group + 1) * _SCORED_ROWS], scores)
        return PromptScores(row.sequence, first + 1, count, own)

    def _place(self, values: Any, *, keep: bool = False) -> Any:
        """Host arrays for a step, data ranks' rows side by side, on their devices.

        Args:
          keep: whether they serve more than one step: one device gets others with the call that takes them.
        """
        ranks = self._steps.ranks
        if ranks is not None:
            return ranks.place(values, jax.tree.map(lambda _: ranks.rows, values))
        return jax.tree.map(jnp.asarray, values) if keep else values

    def _fetched(self, array: Array) -> np.ndarray:
        return np.asarray(array) if self._steps.ranks is None else self._steps.ranks.fetch(array)


def _step_inputs(arrays: StepArrays) -> StepInputs:
    batch: Any = Batch(arrays.block_tables, arrays.query_starts, arrays.kv_lens)  # type: ignore[arg-type]
    given: Any = (arrays.tokens, arrays.sources, arrays.positions, arrays.slots, batch, arrays.last)
    return StepInputs(*given)


def _start_copy(array: Array) -> None:
    if array.is_fully_addressable:
        array.copy_to_host_async()
