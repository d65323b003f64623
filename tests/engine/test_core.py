"""The engine's loop over a runner that only pretends, where a device's faults can be placed at will."""

import dataclasses
import queue
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from minimax_jax.cache import PageAllocator
from minimax_jax.engine.core import EngineCore, RunAhead
from minimax_jax.engine.engine_thread import EngineThread
from minimax_jax.engine.errors import DeviceStepError, EngineClosedError, NonFiniteLogitsError
from minimax_jax.engine.launched_step import LaunchedStep, PromptScores
from minimax_jax.engine.logprobs import TokenLogprobs
from minimax_jax.engine.request import Request
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.scheduler import Scheduler
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.step_arrays import SlotTables, StepShape, step_arrays
from minimax_jax.engine.step_inputs import BAD_LOGITS
from minimax_jax.tokenizer import Tokenizer


class PretendedRunner:
    """Makes real arrays of every plan, runs nothing. `fail_at` counts fetches, `taken_at` launches that lose pages."""

    spans_processes, decodes_whole = False, True

    def __init__(self, segmented: bool, fail_at: int, groups: int = 1):
        self.pool = SimpleNamespace(num_pages=16, resize=self.resize)
        self.bad_at, self.clearing, self.refusals, self.resized = 0, True, 0, []
        self.taken_at = self.launched = 0
        self.taken = False
        self.tables, self.segmented = [SlotTables(4, 16) for _ in range(groups)], segmented
        self.fail_at, self.fetched = fail_at, 0

    def needs_known_tokens(self, plans):
        return self.segmented and any(row.num_tokens > 1 for plan in plans for row in plan.rows)

    def launch(self, plans):
        step_arrays(plans, self.tables, StepShape(32, 4, 16), page_size=4, num_slots=4)
        self.launched += 1
        if self.launched == self.taken_at:
            self.taken = True
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return LaunchedStep(tuple(plans), 4, None, None, (), "prefill", "whole")

    def fetch(self, step):
        self.fetched += 1
        if self.fetched == self.fail_at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        tokens = np.ones((len(self.tables), 4, step.plans[0].num_steps), int)
        tokens += np.arange(len(tokens))[:, None, None]
        if self.fetched == self.bad_at:
            tokens[0, 0] = BAD_LOGITS
        return tokens, None

    def resize(self, num_pages, *, keep):
        self.resized.append(num_pages)
        if len(self.resized) <= self.refusals:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nmore")
        self.taken = False

    def clear_pages(self, wrong):
        if any(wrong) and self.taken:
            raise RuntimeError("Array has been deleted.")  # jax's own, which is no JaxRuntimeError
        if any(wrong) and not self.clearing:
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is busy")

    def reset_rows(self):
        pass


def served(runner, steps=1):
    """(sequences that failed, others) of three, of which each arrives while the one before runs."""
    scheduler = Scheduler(PageAllocator(16), page_size=4, max_batch_size=4, max_num_tokens=32)
    core = EngineCore(runner, [scheduler], run_ahead=RunAhead(steps))
    made = []
    for index in range(3):
        made.append(Sequence(np.arange(5 + index), SamplingParams(max_tokens=6), order=(index, 0), max_new=6))
        core.add(made[-1])
        core.step()
    while core.busy:
        core.step()
        scheduler.check()
    failed = [sequence for sequence in made if sequence.error is not None]
    others = [sequence for sequence in made if sequence.error is None]
    assert all(len(sequence.output) == 6 and sequence.finish_reason == "length" for sequence in others)
    return failed, others


@pytest.mark.parametrize(("segmented", "steps"), [(False, 1), (False, 3), (True, 1)])
@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_step_that_fails_when_it_is_read_ends_one_request(segmented, steps, fail_at):
    failed, _ = served(PretendedRunner(segmented, fail_at), steps)
    assert len(failed) == 1 and isinstance(failed[0].error, DeviceStepError)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_data_ranks_rows_get_its_own_tokens(steps):
    schedulers = [Scheduler(PageAllocator(16), page_size=4, max_batch_size=4, max_num_tokens=32) for _ in range(3)]
    core = EngineCore(PretendedRunner(segmented=False, fail_at=0, groups=3), schedulers, run_ahead=RunAhead(steps))
    made = [Sequence(np.arange(5), SamplingParams(max_tokens=6), order=(i, 0), max_new=6) for i in range(6)]
    for sequence in made:
        core.add(sequence)
    running = [None] * 3
    while core.busy:
        core.step()
        running = [had or list(scheduler.running) for had, scheduler in zip(running, schedulers, strict=True)]
    assert sorted(map(len, running)) == [2, 2, 2]
    for group, sequences in enumerate(running):
        assert all(list(sequence.output) == [1 + group] * 6 for sequence in sequences)


def scores_of(places):
    """Log probabilities that say of which place they are, with 32 tokens beside each as in a loop."""
    beside = places[..., None] * 32 + np.arange(32)
    return TokenLogprobs(-places.astype(np.float32), places, beside, -beside.astype(np.float32))


class ScoringRunner(PretendedRunner):
    """Tokens follow from the place that they take; nothing can be chosen for `bad`."""

    bad = 1_009

    def places(self, sequence, first, count):
        return sequence.order[0] * 1_000 + sequence.order[1] * 100 + first + np.arange(count)

    def launch(self, plans):
        scores = []
        for row in (row for plan in plans for row in plan.rows):
            first, last = row.start + 1, min(row.start + row.num_tokens, row.sequence.num_prompt - 1)
            asked = row.sequence.params.prompt_logprobs is not None and row.sequence.parent is None
            if asked and row.start < last:
                padded = scores_of(self.places(row.sequence, first, 40))
                scores.append(PromptScores(row.sequence, first, last - row.start, padded))
        return dataclasses.replace(super().launch(plans), prompt_scores=tuple(scores))

    def fetch(self, step):
        places = np.zeros((len(self.tables), 4, step.plans[0].num_steps), int)
        for group, plan in enumerate(step.plans):
            for number, row in enumerate(plan.rows):
                places[group, number] = self.places(row.sequence, row.start + row.num_tokens, places.shape[2])
        return np.where(places == self.bad, BAD_LOGITS, places % 50), scores_of(places)

    def fetch_scores(self, scores):
        return scores.scores


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_each_token_keeps_its_own_log_probabilities_and_no_more_than_were_asked_for(steps, groups):
    """Through stop ids, length, bad logits, forks and preemption."""
    runner = ScoringRunner(segmented=False, fail_at=0, groups=groups)
    schedulers = [Scheduler(PageAllocator(7), page_size=4, max_batch_size=4, max_num_tokens=32) for _ in range(groups)]
    core = EngineCore(runner, schedulers, run_ahead=RunAhead(steps), end_ids=[49])
    made = []
    for index, most in enumerate((5, 2, None, 0, 1, 20, 3, 5) * 2):
        stops = [(index * 1_000 + 12) % 50] if index % 4 == 3 else []
        params = SamplingParams(max_tokens=17, logprobs=most, prompt_logprobs=most, stop_token_ids=stops)
        parent = Sequence(np.arange(3 + index % 5), params, order=(index, 0), max_new=17)
        child = Sequence(np.arange(3 + index % 5), params, order=(index, 1), max_new=17, parent=parent)
        made += [parent, child] if index % 3 == 0 else [parent]
    for sequence in made:
        core.add(sequence)
    while core.busy:
        core.step()
    assert sum(scheduler.preemptions for scheduler in schedulers) > 2
    assert {sequence.finish_reason for sequence in made} == {"stop", "length", "error"}
    for sequence in made:
        most, length = sequence.params.logprobs, sequence.num_prompt
        expected = runner.places(sequence, length, len(sequence.output))
        check_scores(sequence.logprobs, [] if most is None else expected, most)
        scored = dict(sorted(sequence.prompt_logprobs.items()))
        assert list(scored) == ([] if most is None or sequence.parent else list(range(1, length)))
        check_scores(scored.values(), runner.places(sequence, 1, len(scored)), most)


def check_scores(scores, places, most):
    for each, place in zip(scores, places, strict=True):
        assert (each.own, each.ranks) == (-place, place)
        assert each.top_ids == [place * 32 + i for i in range(most)] == [-top for top in each.top]


@pytest.mark.parametrize("bad_at", [1, 3, 4])
def test_pages_that_cannot_be_cleared_are_made_anew(bad_at):
    runner = PretendedRunner(segmented=False, fail_at=0)
    runner.bad_at, runner.clearing = bad_at, False
    failed, _ = served(runner)
    assert len(failed) == 1 and isinstance(failed[0].error, NonFiniteLogitsError) and runner.resized == [16]


@pytest.mark.parametrize("bad_at", [1, 2, 4])
def test_a_launch_that_loses_the_pages_after_a_row_that_ends_badly_ends_these_two_alone(bad_at):
    runner = PretendedRunner(segmented=False, fail_at=0)
    runner.bad_at, runner.taken_at = bad_at, bad_at + 1
    failed, _ = served(runner)
    assert {type(sequence.error) for sequence in failed} <= {NonFiniteLogitsError, DeviceStepError}
    assert isinstance(failed[0].error, NonFiniteLogitsError) and len(failed) <= 2 and runner.resized == [16]


def test_pages_that_are_refused_are_asked_for_once_more():
    runner = PretendedRunner(segmented=False, fail_at=2)
    runner.refusals = 1
    failed, _ = served(runner)
    assert len(failed) == 1 and runner.resized == [16, 16]


def test_a_device_that_is_gone_ends_the_engine_and_every_caller_hears_why():
    runner = PretendedRunner(segmented=False, fail_at=2)
    runner.refusals = 2
    scheduler = Scheduler(PageAllocator(16), page_size=4, max_batch_size=4, max_num_tokens=32)
    thread, told = EngineThread(EngineCore(runner, [scheduler])), queue.SimpleQueue()
    params, limits = SamplingParams(max_tokens=6, detokenize=False), {"seed": 0, "max_seq_len": 32, "vocab_size": 9}
    requests = [
        Request(str(i), None, [1] * (4 + i), params, arrival=i, tokenizer=None, **limits) for i in range(3)
    ]  # fmt: skip
    thread.submit(requests, lambda request: told.put(request.output()))
    last = {}
    while len(last) < 3 or not all(output.finished for output in last.values()):
        output = told.get(timeout=5)
        last[output.request_id] = output
    for output in last.values():
        assert output.outputs[0].finish_reason == "error"
        assert isinstance(output.error, (EngineClosedError, DeviceStepError))
    messages = {str(output.error) for output in last.values() if isinstance(output.error, EngineClosedError)}
    assert any("no pages on it any more: RESOURCE_EXHAUSTED: no room" in message for message in messages)
    with pytest.raises(EngineClosedError, match="no pages on it any more"):
        thread.submit(requests, told.put)
    thread.close()


def test_a_request_that_is_failed_keeps_the_text_that_was_held_back_for_a_stop_string():
    tokenizer, params = Tokenizer.from_pretrained("tiny"), SamplingParams(max_tokens=9, stop="two three")
    request = Request(
        "0", None, [1], params, arrival=0, seed=0, max_seq_len=32, vocab_size=9, tokenizer=tokenizer
    )  # fmt: skip
    for token in tokenizer.encode("one two"):
        request.sequences[0].text.push(token)
    before = request.output().outputs[0].text
    request.fail(EngineClosedError("closed"), "abort")
    assert before == "one " and request.output().outputs[0].text == "one two"
