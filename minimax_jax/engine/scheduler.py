"""What the next step computes: continuous batching over a pool of pages. Host code; touches no device."""

from __future__ import annotations

import bisect
import dataclasses
from typing import NamedTuple

from minimax_jax.cache import PageAllocator, SequencePages
from minimax_jax.engine.sequence import NO_SLOT, Sequence, Status


class PlannedRow(NamedTuple):
    """One sequence's part of a launch; a named tuple, since each launch makes one for every sequence.

    Attributes:
      start, num_tokens: which of its tokens the first step computes.
      num_chosen: tokens that are chosen, one a step: 0 unless the sequence's last token is among those. All but the
        last of them are computed as well.
      begins: whether it takes its slot with this launch.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_chosen: int
    begins: bool

    @property
    def end(self) -> int:
        """The first token that is not computed."""
        return self.start + self.num_tokens + max(self.num_chosen - 1, 0)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one launch computes: a step, or several of one token a row.

    Attributes:
      rows: the sequences, those with one token first.
      copies: (page, copy) pairs, to be copied before the step.
      num_steps: steps of the launch.
    """

    rows: tuple[PlannedRow, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    num_steps: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the first step computes."""
        return sum(row.num_tokens for row in self.rows)

    def unfinished(self) -> StepPlan:
        """The plan without sequences that have ended since it was made."""
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if not row.sequence.finished))


class Scheduler:
    """Shares steps and pages out among sequences, in the order of their arrival.

    A step computes the next token of every sequence that is past its prompt, then parts of prompts, oldest first, up
    to a budget of tokens. Waiting sequences start in order when there are pages for all of their tokens. When pages
    run out the youngest running sequence gives up its own and waits again; what it had computed may be found again by
    content. So the oldest always goes on, and every sequence becomes the oldest one day: none starves.

    Attributes:
      allocator: of the pages.
      running, waiting: sequences, oldest first.
      preemptions: how often a sequence lost its pages.
    """

    def __init__(self, allocator: PageAllocator, *, page_size: int, max_batch_size: int, max_num_tokens: int):
        """
        Args:
          max_batch_size: sequences that run at once.
          max_num_tokens: of one step.

        Raises:
          ValueError: if one of them is not positive, or a full batch leaves no token for a prompt.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size = {max_batch_size}: must be at least 1")
        if max_num_tokens < max_batch_size:
            raise ValueError(
                f"max_num_tokens = {max_num_tokens}: must be at least max_batch_size = {max_batch_size}, a token for "
                "each sequence"
            )
        self.allocator = allocator
        self._page_size, self._max_batch, self._max_tokens = page_size, max_batch_size, max_num_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._slots = list(range(max_batch_size - 1, -1, -1))  # the lowest is taken first
        self.preemptions = 0

    @property
    def capacity(self) -> int:
        """Tokens that one sequence alone can have in the pool."""
        return self.allocator.num_pages * self._page_size

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in; it must fit the pool alone (`capacity`)."""
        assert sequence.pages is None
        sequence.pages = SequencePages(self.allocator, self._page_size)
        bisect.insort(self.waiting, sequence, key=_order)

    def finish(self, sequence: Sequence, *, discard: bool = False) -> list[int]:
        """Ends a sequence in whatever state; a second call does nothing.

        Args:
          discard: whether its pages are never to be found again, since what is on them is wrong.

        Returns:
          With `discard`, pages that nobody holds now, which are to be cleared.
        """
        if sequence.finished:
            return []
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self._give_slot_back(sequence)
        sequence.status = Status.FINISHED
        assert sequence.pages is not None
        if discard:
            return sequence.pages.discard()
        sequence.pages.release()
        return []

    def may_run_ahead(self, num_steps: int) -> bool:
        """Whether a launch may take several steps: no part of a prompt waits to be computed, and there are pages."""
        needed = 0
        for sequence in self.running:
            if (uncomputed := sequence.num_uncomputed) > 1:
                return False
            if uncomputed:
                assert sequence.pages is not None
                first = sequence.num_computed
                needed += sequence.pages.pages_needed(first, first + min(num_steps, sequence.num_left))
            elif self.waiting:  # it is done once it is read, and makes room
                return False
        if needed > self.allocator.num_available:
            return False
        if not self.waiting or len(self.running) == self._max_batch:
            return True
        first_waiting = self.waiting[0]
        assert first_waiting.pages is not None
        starts = self._reserve(first_waiting) is not None
        first_waiting.pages.release()
        return not starts

    def schedule(self, num_steps: int = 1) -> StepPlan:
        """The next launch, which must then be made; empty if there is nothing to do.

        Sequences are taken to have computed it: the next call may come before its results.

        Args:
          num_steps: more than one only where `may_run_ahead` says so.
        """
        if num_steps > 1:
            return self._run_ahead(num_steps)
        step = _Step(self._max_tokens)
        preempted = False
        left = {sequence: sequence.num_uncomputed for sequence in self.running}
        singles = [sequence for sequence, count in left.items() if count == 1]
        for sequence in singles + [sequence for sequence, count in left.items() if count > 1]:
            if sequence.status is not Status.RUNNING or not step.budget:
                continue
            count = min(left[sequence], step.budget)
            copies = self._grow(sequence, count)
            while copies is None:
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                step.drop(victim)
                if victim is sequence:
                    break
                copies = self._grow(sequence, count)
            else:
                step.take(sequence, count, copies)
        while not preempted and step.budget and self.waiting and len(self.running) < self._max_batch:
            if not self._start(self.waiting[0], step):
                break
        return step.commit()

    def _run_ahead(self, num_steps: int) -> StepPlan:
        rows: list[PlannedRow] = []
        copies: list[tuple[int, int]] = []
        for sequence in self.running:
            if sequence.num_uncomputed:
                row = PlannedRow(sequence, sequence.num_computed, 1, min(num_steps, sequence.num_left), False)
                own = self._grow(sequence, row.end - row.start)
                assert own is not None
                sequence.num_computed = row.end
                sequence.num_pending += row.num_chosen
                rows.append(row)
                copies += own
        return StepPlan(tuple(rows), tuple(copies), num_steps)

    def start_over(self) -> None:
        """Has every running sequence wait and compute everything anew: the caches are lost, and unread steps too."""
        for sequence in list(self.running):
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.unread()
        self.allocator.forget_all()

    def _grow(self, sequence: Sequence, count: int) -> list[tuple[int, int]] | None:
        assert sequence.pages is not None
        return sequence.pages.grow(sequence.num_computed, sequence.num_computed + count)

    def _start(self, sequence: Sequence, step: _Step) -> bool:
        """Moves the first waiting sequence into the batch, if there are pages for all of its tokens."""
        pages, found = sequence.pages, self._reserve(sequence)
        assert pages is not None
        if found is None:
            return False
        sequence.num_computed = found
        count = min(sequence.num_tokens - found, step.budget)
        copies = self._grow(sequence, count)
        if copies is None:
            pages.release()
            sequence.num_computed = 0
            return False
        if self._searches(sequence):
            pages.count_reuse(sequence.known)
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_order)
        sequence.status, sequence.slot = Status.RUNNING, self._slots.pop()
        sequence.found = found if sequence.found is None else sequence.found
        step.take(sequence, count, copies, begins=True)
        return True

    def _reserve(self, sequence: Sequence) -> int | None:
        """Takes the pages that a waiting sequence finds or shares.

        Returns:
          The tokens on them; None, and no page is held, if there are too few pages for the rest of its tokens.
        """
        pages, parent = sequence.pages, sequence.parent
        assert pages is not None and sequence.num_pending == 0
        found = 0
        if self._shares(sequence):
            assert parent is not None and parent.pages is not None
            pages.share(parent.pages, sequence.num_prompt)
            found = sequence.num_prompt - 1  # the last token is computed again, for logits of its own
        elif self._searches(sequence):
            found = pages.find(sequence.known)
        if pages.pages_missing(sequence.num_tokens) > self.allocator.num_available:
            pages.release()
            return None
        return found

    def _shares(self, sequence: Sequence) -> bool:
        """Whether the sequence can take the prompt's pages from its parent."""
        parent = sequence.parent
        if parent is None or parent.status is not Status.RUNNING:
            return False
        return parent.num_computed >= sequence.num_prompt and sequence.num_new == 0

    def _searches(self, sequence: Sequence) -> bool:
        """Whether the sequence looks for pages by content: not if somebody asks about every token of its prompt."""
        scored = sequence.params.prompt_logprobs is not None and sequence.parent is None
        return self.allocator.reuse and not scored and not self._shares(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.pages is not None
        self.running.remove(sequence)
        sequence.pages.release()
        sequence.num_computed = 0
        self._give_slot_back(sequence)
        sequence.status = Status.WAITING
        sequence.times_preempted += 1
        self.preemptions += 1
        bisect.insort(self.waiting, sequence, key=_order)

    def _give_slot_back(self, sequence: Sequence) -> None:
        if sequence.slot != NO_SLOT:
            self._slots.append(sequence.slot)
            sequence.slot = NO_SLOT

    def check(self) -> None:
        """Raises AssertionError unless sequences, slots and pages agree."""
        held: dict[int, int] = {}
        for sequence in self.running:
            assert sequence.status is Status.RUNNING and sequence.pages is not None
            assert sequence.pages.pages_missing(sequence.num_computed) == 0
            for page in sequence.pages.table:
                held[page] = held.get(page, 0) + 1
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING and sequence.pages is not None
            assert not sequence.pages.table and sequence.num_computed == 0 and sequence.slot == NO_SLOT
        self.allocator.check(held)
        taken = [sequence.slot for sequence in self.running]
        assert sorted(taken + self._slots) == list(range(self._max_batch)), "slots are lost or given twice"
        for queue in (self.running, self.waiting):
            assert [s.order for s in queue] == sorted({s.order for s in queue}), "a queue is out of order"


class _Step:
    """A plan in the making: rows can still be dropped."""

    def __init__(self, budget: int):
        self.budget = budget
        self._taken: dict[Sequence, tuple[int, list[tuple[int, int]], bool]] = {}

    def take(self, sequence: Sequence, count: int, copies: list[tuple[int, int]], *, begins: bool = False) -> None:
        self._taken[sequence] = (count, copies, begins)
        self.budget -= count

    def drop(self, sequence: Sequence) -> None:
        count, _, _ = self._taken.pop(sequence, (0, [], False))
        self.budget += count

    def commit(self) -> StepPlan:
        rows, copies = [], []
        for sequence, (count, own, begins) in self._taken.items():
            start, end = sequence.num_computed, sequence.num_computed + count
            rows.append(PlannedRow(sequence, start, count, int(end == sequence.num_tokens), begins))
            sequence.num_computed = end
            sequence.num_pending += rows[-1].num_chosen
            copies += own
        rows.sort(key=lambda row: row.num_tokens > 1)
        return StepPlan(tuple(rows), tuple(copies))


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
