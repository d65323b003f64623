"""The engine's loop: plan the next launch while the last one runs, make it, then read the last one's tokens."""

from __future__ import annotations

import collections
import dataclasses
import gc
from collections.abc import Sequence as Rows
from typing import Any

import jax
import numpy as np

from minimax_jax.engine.errors import DeviceLostError, DeviceStepError, NonFiniteLogitsError
from minimax_jax.engine.launched_step import LaunchedStep
from minimax_jax.engine.logprobs import by_token
from minimax_jax.engine.scheduler import PlannedRow, Scheduler, StepPlan
from minimax_jax.engine.sequence import Sequence, Status
from minimax_jax.engine.step_inputs import BAD_LOGITS
from minimax_jax.engine.step_runner import StepRunner


@dataclasses.dataclass
class CoreCounts:
    """What the loop did so far.

    Attributes:
      launches: of a step, or of several.
      steps: by (kind, execution).
      prompt_tokens, new_tokens: computed, and chosen and read.
      failed_steps: that the device refused.
    """

    launches: int = 0
    steps: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    prompt_tokens: int = 0
    new_tokens: int = 0
    failed_steps: int = 0


@dataclasses.dataclass(frozen=True)
class RunAhead:
    """When a launch may take several decode steps.

    Attributes:
      num_steps: so many, 1 for never.
      while_streaming: whether also while somebody is told of every token.
    """

    num_steps: int = 1
    while_streaming: bool = True


class EngineCore:
    """Runs sequences to their ends, one launch a call. One thread at a time; nothing runs between the calls.

    Attributes:
      runner: the device's side; schedulers: one a data rank.
      counts: what was done.
    """

    def __init__(
        self,
        runner: StepRunner,
        schedulers: Rows[Scheduler],
        *,
        end_ids: Rows[int] = (),
        run_ahead: RunAhead = RunAhead(),
    ):
        """
        Args:
          end_ids: end-of-text tokens.
          run_ahead: when a launch takes several steps.
        """
        self.runner, self.schedulers = runner, list(schedulers)
        self._run_ahead = run_ahead
        self.counts = CoreCounts()
        self._end_ids = frozenset(end_ids)
        self._inflight: LaunchedStep | None = None
        self._intact = True  # whether the device still had everything when a step was read last
        self._children: dict[Sequence, list[Sequence]] = {}

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self._inflight is not None or any(s.running or s.waiting for s in self.schedulers)

    def add(self, sequence: Sequence, *, group: int | None = None) -> None:
        """Takes a sequence in. A child starts once its parent's prompt is computed, whose pages it then shares.

        Args:
          group: the data rank; None for the one with the fewest sequences.
        """
        parent = sequence.parent
        if parent is not None and not parent.finished and parent.num_new == 0:
            self._children.setdefault(parent, []).append(sequence)
            return
        if parent is not None:
            group = parent.group
        loads = [len(s.running) + len(s.waiting) for s in self.schedulers]
        sequence.group = int(np.argmin(loads)) if group is None else group
        self.schedulers[sequence.group].add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence; its pages are free at once, and a step that computes it goes unread."""
        if not sequence.finished:
            self._end(sequence, "abort")

    def step(self) -> list[Sequence]:
        """Launches what comes next and reads the launch before; returns the sequences that got tokens or ended.

        Raises:
          jax.errors.JaxRuntimeError: over ranks of several processes, for a step that the device refused. Elsewhere it
            ends one request.
          DeviceLostError: if the device gives no pages for the other requests to go on with.
        """
        touched: list[Sequence] = []
        num_steps = self._num_steps()
        plans = [scheduler.schedule(num_steps) for scheduler in self.schedulers]
        if self._inflight is not None and any(p.rows for p in plans) and self.runner.needs_known_tokens(plans):
            touched += self._read()
            if not self._intact:  # all sequences wait again: these plans are of their last life
                return touched
            plans = [plan.unfinished() for plan in plans]
        launched: LaunchedStep | None = None
        if any(plan.rows for plan in plans):
            try:
                launched = self.runner.launch(plans)
            except jax.errors.JaxRuntimeError as error:
                if self.runner.spans_processes:
                    raise
                touched += self._read(clear=False)  # the failed launch may have taken the pages; all are made anew
                return touched + (self._start_over(plans, error) if self._intact else [])
            self._count(launched)
        touched += self._read()
        self._inflight = launched if self._intact else None
        return touched

    def _num_steps(self) -> int:
        """Steps that the next launch takes."""
        most, running = self._run_ahead.num_steps, [s for scheduler in self.schedulers for s in scheduler.running]
        if most == 1 or self._children or not self.runner.decodes_whole:
            return 1
        # steps that nobody needs cost the device less than a launch for each of the last few
        if max((sequence.num_left for sequence in running), default=0) <= most // 2:
            return 1
        if not self._run_ahead.while_streaming and any(sequence.streams for sequence in running):
            return 1
        return most if all(scheduler.may_run_ahead(most) for scheduler in self.schedulers) else 1

    def _count(self, step: LaunchedStep) -> None:
        self.counts.launches += 1
        self.counts.steps[step.kind, step.how] += step.plans[0].num_steps
        # of steps of one token a row too: it may be a prompt's last or only one
        rows = (row for plan in step.plans for row in plan.rows if row.start < row.sequence.num_prompt)
        self.counts.prompt_tokens += sum(min(row.num_tokens, row.sequence.num_prompt - row.start) for row in rows)

    def _read(self, *, clear: bool = True) -> list[Sequence]:
        """Takes in the tokens of the step in flight, waiting for them.

        Args:
          clear: whether to clear the pages of rows that end badly.
        """
        step, self._inflight, self._intact = self._inflight, None, True
        if step is None:
            return []
        try:
            tokens, logprobs = self.runner.fetch(step)
            for scores in step.prompt_scores:
                self._keep_scores(scores.sequence, scores.first, scores.count, self.runner.fetch_scores(scores))
        except jax.errors.JaxRuntimeError as error:
            if self.runner.spans_processes:  # the others may have seen it succeed, and nobody can tell them
                raise
            self._intact = False
            return self._start_over(step.plans, error)
        touched: list[Sequence] = []
        wrong: list[list[int]] = [[] for _ in self.schedulers]
        for group, plan in enumerate(step.plans):
            chosen = tokens[group].tolist()
            for number, row in enumerate(plan.rows):
                sequence = row.sequence
                if sequence.finished:
                    continue
                if not row.num_chosen:
                    if chosen[number][0] == BAD_LOGITS:
                        wrong[group] += self._end_badly(row, 0)
                        touched.append(sequence)
                    else:
                        self._register(sequence, row.end)
                    continue
                touched.append(sequence)
                own_tokens = chosen[number][: row.num_chosen]
                asked: list[Any] | None = None
                if logprobs is not None and (most := sequence.params.logprobs) is not None:
                    at = (group, number, slice(row.num_chosen))
                    asked = by_token(jax.tree.map(lambda x, at=at: x[at], logprobs), most)
                first = self._take_plain(row, own_tokens, asked)
                for place, token in enumerate(own_tokens[first:], first):
                    if token == BAD_LOGITS:
                        wrong[group] += self._end_badly(row, place)
                        break
                    own = None if asked is None else asked[place]
                    if not self._take(sequence, token, row.start + row.num_tokens + place, own):
                        break
        if not clear:
            return touched
        try:
            self.runner.clear_pages(wrong)
        except jax.errors.JaxRuntimeError:
            if self.runner.spans_processes:
                raise
            self._intact = False
            self.counts.failed_steps += 1
            self._make_anew()  # all pages are clean then, and whoever runs computes its tokens again
        return touched

    def _end_badly(self, row: PlannedRow, place: int) -> list[int]:
        """Ends a row after whose step number `place` there was nothing to choose from; returns pages to clear."""
        row.sequence.error = NonFiniteLogitsError(row.start + row.num_tokens - 1 + place)
        return self._end(row.sequence, "error", discard=True)

    def _take_plain(self, row: PlannedRow, tokens: list[int], logprobs: list[Any] | None) -> int:
        """Takes a row's first tokens, those that surely end nothing, together; how many these are."""
        sequence = row.sequence
        if len(tokens) == 1 or sequence.params.stop:
            return 0
        ends = sequence.params.ends(self._end_ids)
        end = next((place for place, token in enumerate(tokens) if token < 0 or token in ends), len(tokens))
        count = min(end, sequence.num_prompt + sequence.max_new - 1 - sequence.num_known)
        if count > 0:
            sequence.extend(tokens[:count])
            if logprobs is not None:
                sequence.logprobs += logprobs[:count]
            if sequence.text is not None:
                sequence.text.extend(tokens[:count])
            self.counts.new_tokens += count
            self._register(sequence, row.start + row.num_tokens + count - 1)
            self._release_children(sequence)
        return max(count, 0)

    def _take(self, sequence: Sequence, token: int, computed: int, logprobs: Any) -> bool:
        """A token that was chosen once `computed` tokens were in the caches; whether the sequence goes on."""
        sequence.append(token)
        self.counts.new_tokens += 1
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        self._register(sequence, computed)
        self._release_children(sequence)
        self._check_end(sequence, token)
        return not sequence.finished

    def _register(self, sequence: Sequence, computed: int) -> None:
        """Lets others find the pages that the first `computed` tokens, as far as they are known, have filled."""
        if sequence.status is Status.RUNNING:
            assert sequence.pages is not None
            computed = min(computed, sequence.num_known)
            if sequence.pages.fills_a_page(computed):
                sequence.pages.register(sequence.known[:computed])

    def _check_end(self, sequence: Sequence, token: int) -> None:
        params, length = sequence.params, sequence.num_known - sequence.num_prompt
        search = length > params.min_tokens or length >= sequence.max_new
        ends = token in self._end_ids and not params.ignore_eos
        if ends or token in params.stop_token_ids:
            if sequence.text is not None and params.include_stop_str_in_output:
                sequence.text.push(token, search=search)
            sequence.stop_reason = None if ends else token
            self._end(sequence, "stop")
        elif sequence.text is not None and (found := sequence.text.push(token, search=search)) is not None:
            sequence.stop_reason = found
            self._end(sequence, "stop", cut=True)
        elif length >= sequence.max_new:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, reason: str, *, discard: bool = False, cut: bool = False) -> list[int]:
        """Ends a sequence; returns pages to clear."""
        sequence.finish_reason = reason
        if sequence.text is not None and not cut:
            found = sequence.text.finish(search=reason == "length")
            if found is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", found
        for children in self._children.values():
            if sequence in children:  # it never got to a scheduler
                children.remove(sequence)
                sequence.status = Status.FINISHED
                return []
        cleared = self.schedulers[sequence.group].finish(sequence, discard=discard)
        self._release_children(sequence)
        return cleared

    def _release_children(self, sequence: Sequence) -> None:
        if self._children:
            for child in self._children.pop(sequence, ()):
                self.add(child, group=sequence.group)

    def _keep_scores(self, sequence: Sequence, first: int, count: int, scores: Any) -> None:
        most = sequence.params.prompt_logprobs
        assert most is not None
        for number, one in enumerate(by_token(jax.tree.map(lambda x: x[:count], scores), most), first):
            sequence.prompt_logprobs.setdefault(number, one)

    def _start_over(self, plans: Rows[StepPlan], error: Exception) -> list[Sequence]:
        """After the device failed a step: the sequence with the most tokens in it ends, all others compute anew."""
        self.counts.failed_steps += 1
        rows = [row for plan in plans for row in plan.rows if not row.sequence.finished]
        self._make_anew()
        ended = []
        if rows:
            culprit = max(rows, key=lambda row: (row.num_tokens, row.sequence.order)).sequence
            culprit.error = DeviceStepError(sum(row.num_tokens for row in rows), error)
            self._end(culprit, "error")
            ended.append(culprit)
        return ended

    def _make_anew(self) -> None:
        """Fresh pages and rows of the same sizes, since a failed step has taken the old ones; all sequences wait."""
        for scheduler in self.schedulers:
            scheduler.start_over()
        self._inflight = None
        for last_try in (False, True):
            try:
                self.runner.pool.resize(self.schedulers[0].allocator.num_pages, keep=False)
                self.runner.reset_rows()
                return
            except jax.errors.JaxRuntimeError as error:
                if last_try:
                    raise DeviceLostError(error) from error
                gc.collect()  # what the failed step leaves behind may hold memory
