"""The scheduler over a pretended device: pages hold the tokens up to each position, so that mistakes show."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minimax_jax.cache import PageAllocator
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.scheduler import Scheduler
from minimax_jax.engine.sequence import Sequence, Status

PAGE, PAGES, BATCH, BUDGET, END = 4, 9, 4, 6, 3


def next_token(prefix):
    return sum((i + 1) * (t + 1) for i, t in enumerate(prefix)) % 5


class PretendedEngine:
    """Runs plans as the device would, and reads each result only after the next step was launched."""

    def __init__(self, pages=PAGES, batch=BATCH, budget=BUDGET, *, reuse=True):
        self.scheduler = Scheduler(
            PageAllocator(pages, reuse=reuse), page_size=PAGE, max_batch_size=batch, max_num_tokens=budget
        )
        self.budget, self.content, self.last, self.inflight, self.all = budget, {}, {}, None, []
        self.computed = []  # tokens of each step

    def add(self, prompt, max_new, parent=None, end=END):
        order = (parent.order[0], parent.order[1] + 1) if parent else (len(self.all), 0)
        sequence = Sequence(np.array(prompt), SamplingParams(max_tokens=max_new), order=order, max_new=max_new,
                            parent=parent)  # fmt: skip
        sequence.end = end
        self.all.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self, ahead=1):
        ahead = ahead if self.scheduler.may_run_ahead(ahead) else 1
        plan = self.scheduler.schedule(ahead)
        assert plan.num_tokens <= self.budget and plan.num_steps == ahead
        launched = self._launch(plan) if plan.rows else None
        if self.inflight:
            self._read(*self.inflight)
        self.inflight = launched
        self.scheduler.check()
        return plan

    def _launch(self, plan):
        self.computed.append(plan.num_tokens)
        for old, new in plan.copies:
            for offset in range(PAGE):
                self.content[new, offset] = self.content.get((old, offset))
        chosen = []
        for row in plan.rows:
            table, prefix, end = row.sequence.pages.table, (), row.sequence.end
            if row.start >= row.sequence.num_known and self.last[row.sequence.slot] == end:
                chosen.append([])  # it has ended, and the host will know before it reads this
                continue
            if row.start:
                prefix = self.content[table[(row.start - 1) // PAGE], (row.start - 1) % PAGE]
                assert len(prefix) == row.start
            for place in range(row.start, row.start + row.num_tokens):
                known = place < row.sequence.num_known
                prefix += (int(row.sequence.known[place]) if known else self.last[row.sequence.slot],)
                assert self.scheduler.allocator.references(table[place // PAGE]) == 1
                self.content[table[place // PAGE], place % PAGE] = prefix
            chosen.append([next_token(prefix)])
            for place in range(row.start + row.num_tokens, row.end):
                if chosen[-1][-1] == end:  # writes nothing more
                    break
                prefix += (chosen[-1][-1],)
                assert self.scheduler.allocator.references(table[place // PAGE]) == 1
                self.content[table[place // PAGE], place % PAGE] = prefix
                chosen[-1].append(next_token(prefix))
            if row.num_chosen:
                self.last[row.sequence.slot] = chosen[-1][-1]
        return plan, chosen

    def _read(self, plan, chosen):
        for row, tokens in zip(plan.rows, chosen, strict=True):
            sequence = row.sequence
            for place, token in enumerate(tokens):
                if sequence.finished:
                    break
                if row.num_chosen:
                    sequence.append(token)
                if sequence.status is Status.RUNNING:
                    computed = row.start + row.num_tokens + place
                    sequence.pages.register(sequence.known[: min(computed, sequence.num_known)])
                if row.num_chosen and (token == sequence.end or len(sequence.output) == sequence.max_new):
                    self.scheduler.finish(sequence)

    def drain(self):
        for _ in range(3000):
            if not self.scheduler.running and not self.scheduler.waiting:
                return
            self.step()
        raise AssertionError("sequences never end")


def check_output(sequence):
    tokens = [int(t) for t in sequence.known[: sequence.num_prompt]]
    for token in sequence.output:
        assert token == next_token(tokens)
        tokens.append(int(token))


class Serving(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.engine = PretendedEngine()
        self.aborted = set()

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), max_new=st.integers(1, 12))
    def arrive(self, prompt, max_new):
        self.engine.add(prompt, max_new)

    @precondition(lambda self: any(s.status is Status.RUNNING for s in self.engine.all))
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from([s for s in self.engine.all if s.status is Status.RUNNING]))
        if not any(s.order == (parent.order[0], parent.order[1] + 1) for s in self.engine.all):
            self.engine.add(parent.known[: parent.num_prompt].tolist(), parent.max_new, parent)

    @rule(count=st.integers(1, 4), ahead=st.sampled_from([1, 3, 7]))
    def steps(self, count, ahead):
        for _ in range(count):
            self.engine.step(ahead)

    @precondition(lambda self: self.engine.all)
    @rule(data=st.data())
    def abort(self, data):
        sequence = data.draw(st.sampled_from(self.engine.all))
        if not sequence.finished:
            self.aborted.add(sequence)
        self.engine.scheduler.finish(sequence)

    @invariant()
    def everything_agrees(self):
        self.engine.scheduler.check()

    def teardown(self):
        self.engine.drain()
        self.engine.step()  # what was in flight
        for sequence in self.engine.all:
            check_output(sequence)
            ended = len(sequence.output) == sequence.max_new or (sequence.output == END).any()
            assert sequence in self.aborted or ended
        self.engine.scheduler.allocator.check({})


Serving.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestServing = Serving.TestCase


def test_single_tokens_go_before_prompts_and_all_fit_the_budget():
    engine = PretendedEngine(pages=40)
    first = engine.add([0, 1], 9, end=None)
    engine.step()
    long = engine.add([1] * 14, 3, end=None)
    plan = engine.step()
    assert [(row.sequence, row.start, row.num_tokens, row.num_chosen) for row in plan.rows] == [
        (first, 2, 1, 1), (long, 0, 5, 0),
    ]  # fmt: skip
    assert [[row.num_tokens for row in engine.step().rows] for _ in range(3)] == [[1, 5], [1, 4], [1, 1]]


def test_the_oldest_is_never_preempted_and_the_youngest_first():
    engine = PretendedEngine(pages=4, reuse=False)
    sequences = [engine.add([i, 1, 0], 12, end=None) for i in range(3)]
    engine.drain()
    preempted = [sequence.times_preempted for sequence in sequences]
    assert preempted[0] == 0 and preempted[2] >= 1 and engine.scheduler.preemptions == sum(preempted)
    for sequence in sequences:
        check_output(sequence)
        assert len(sequence.output) == 12


def test_a_second_prompt_computes_only_what_is_new():
    engine = PretendedEngine(pages=40, budget=64)
    engine.add([0, 1] * 6, 1)
    engine.drain()
    engine.computed.clear()
    second = engine.add([0, 1] * 6 + [1, 1], 1)
    engine.drain()
    assert engine.computed[0] == 2 and second.found == 12
    third = engine.add([0, 1, 0, 1, 1, 1, 1], 1)
    engine.drain()
    assert third.found == 4  # trimmed on the page's edge


def test_answers_share_their_prompts_pages_up_to_its_last_token():
    engine = PretendedEngine(pages=40, budget=64)
    parent = engine.add([0, 1, 0, 1, 1, 0], 6, end=None)
    engine.step()
    child = engine.add([0, 1, 0, 1, 1, 0], 6, parent=parent, end=None)
    plan = engine.step()
    assert child.found == 5 and len(plan.copies) == 1 and plan.num_tokens == 2
    assert child.pages.table[0] == parent.pages.table[0] and child.pages.table[1] != parent.pages.table[1]
    engine.drain()
    assert child.output.tolist() == parent.output.tolist()


def test_several_steps_are_planned_only_where_nobody_has_to_wait_for_them():
    engine = PretendedEngine(pages=8, batch=2, budget=8)
    first = engine.add([0, 1], 20, end=None)
    ahead = [engine.scheduler.may_run_ahead(5)]  # its prompt waits
    engine.step()
    ahead.append(engine.scheduler.may_run_ahead(5))
    plan = engine.step(5)
    assert [(row.start, row.num_tokens, row.num_chosen, row.end) for row in plan.rows] == [(2, 1, 5, 7)]
    assert len(first.pages.table) == 2 and first.num_pending == 6 - 1  # the first step's token is known by now
    second = engine.add([1] * 12, 3, end=None)
    ahead.append(engine.scheduler.may_run_ahead(5))  # a prompt could start
    engine.step()
    ahead.append(engine.scheduler.may_run_ahead(5))  # it has begun, and some of it is left
    engine.step()
    engine.add([1], 1, end=None)
    ahead.append(engine.scheduler.may_run_ahead(5))  # no slot for the third, and pages
    plan = engine.step(5)
    assert [(row.sequence, row.num_chosen) for row in plan.rows] == [(first, 5), (second, 2)]
    ahead.append(engine.scheduler.may_run_ahead(5))  # the second is done, though unread: the third could start
    assert ahead == [False, True, False, False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0, "max_num_tokens": 4}, "max_batch_size = 0: must be at least 1"),
        ({"max_batch_size": 5, "max_num_tokens": 4}, "max_num_tokens = 4: must be at least max_batch_size = 5"),
    ],
)
def test_limits_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(PageAllocator(2), page_size=PAGE, **options)
