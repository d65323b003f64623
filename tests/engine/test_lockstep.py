"""Over several processes the engine's thread serves one call after the other, whenever the next one comes."""

import threading

import pytest

from minimax_jax.engine.engine_thread import EngineThread
from minimax_jax.engine.errors import EngineClosedError


class FakeRequest:
    """One sequence, which is the request itself."""

    def __init__(self, steps):
        self.left, self.finished, self.error = steps, False, None
        self.sequences, self.done = [self], threading.Event()

    def note_time(self):
        if self.finished:
            self.done.set()

    def fail(self, error, reason):
        self.error, self.finished = error, True


class FakeCore:
    """Gives each sequence its steps, one a call; notes what was added while others ran."""

    def __init__(self):
        self.running, self.joined = [], []
        self.stepping, self.go = threading.Event(), threading.Event()

    @property
    def busy(self):
        return bool(self.running)

    def add(self, sequence):
        if any(other.begun for other in self.running):
            self.joined.append(sequence)
        sequence.begun = False
        self.running.append(sequence)

    def step(self):
        self.stepping.set()
        assert self.go.wait(5)
        for sequence in self.running:
            sequence.begun = True
            sequence.left -= 1
            sequence.finished = sequence.left == 0
        touched, self.running = self.running, [sequence for sequence in self.running if not sequence.finished]
        return touched


@pytest.mark.parametrize("lockstep", [True, False])
def test_what_comes_meanwhile_waits_in_lockstep(lockstep):
    core = FakeCore()
    thread = EngineThread(core, lockstep=lockstep)
    first, second, later = FakeRequest(3), FakeRequest(2), FakeRequest(1)
    thread.submit([first, second], lambda request: None)  # of one call: together
    assert core.stepping.wait(5)
    thread.submit([later], lambda request: None)  # while the first step runs
    core.go.set()
    assert all(request.done.wait(5) for request in (first, second, later))
    assert core.joined == ([] if lockstep else [later])
    thread.close()


def test_giving_a_request_up_in_lockstep_ends_the_engine():
    core = FakeCore()
    thread, request = EngineThread(core, lockstep=True), FakeRequest(3)
    thread.submit([request], lambda request: None)
    assert core.stepping.wait(5)
    thread.abort(request)
    core.go.set()
    assert request.done.wait(5) and isinstance(request.error, EngineClosedError)
    with pytest.raises(EngineClosedError):
        thread.submit([FakeRequest(1)], lambda request: None)
