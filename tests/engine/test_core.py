"""The engine's loop over a runner that only pretends, where a device's faults can be placed at will."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from minimax_jax.cache import PageAllocator
from minimax_jax.engine.core import EngineCore
from minimax_jax.engine.launched_step import LaunchedStep
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.scheduler import Scheduler
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.step_arrays import SlotTables, StepShape, step_arrays


class PretendedRunner:
    """Makes real arrays of every plan, runs nothing; `fail_at` counts fetches."""

    spans_processes, decodes_whole = False, True

    def __init__(self, segmented: bool, fail_at: int):
        self.pool = SimpleNamespace(num_pages=16, resize=lambda *_, **__: None)
        self.tables, self.segmented, self.fail_at, self.fetched = [SlotTables(4, 16)], segmented, fail_at, 0

    def needs_known_tokens(self, plans):
        return self.segmented and any(row.num_tokens > 1 for plan in plans for row in plan.rows)

    def launch(self, plans):
        step_arrays(plans, self.tables, StepShape(32, 4, 16), page_size=4, num_slots=4)
        return LaunchedStep(tuple(plans), 4, None, None, (), "prefill", "whole")

    def fetch(self, step):
        self.fetched += 1
        if self.fetched == self.fail_at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return np.ones((1, 4, step.plans[0].num_steps), int), None

    def clear_pages(self, wrong):
        pass

    def reset_rows(self):
        pass


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_step_that_fails_when_it_is_read_ends_one_request(segmented, fail_at):
    scheduler = Scheduler(PageAllocator(16), page_size=4, max_batch_size=4, max_num_tokens=32)
    core = EngineCore(PretendedRunner(segmented, fail_at), [scheduler])
    made = []
    for index in range(3):  # each arrives while the one before runs
        made.append(Sequence(np.arange(5 + index), SamplingParams(max_tokens=6), order=(index, 0), max_new=6))
        core.add(made[-1])
        core.step()
    while core.busy:
        core.step()
        scheduler.check()
    failed = [sequence for sequence in made if sequence.error is not None]
    assert len(failed) == 1
    assert all(len(sequence.output) == 6 for sequence in made if sequence not in failed)
