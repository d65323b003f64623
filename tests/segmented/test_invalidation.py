"""Epochs: what is cleared, what survives, and that nothing stale is ever replayed."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmented_samples import NAMES, ROWS, Runtime, assert_same, compilations, into, rows_of, segmented, stack, weights

from minimax_jax.segmented import Epoch, StaleCaptureError, boundary, unregister_boundary


def captured(epoch, fn=stack, **options):
    split = segmented(fn, **options)
    w = weights(3)
    for _ in range(3):
        split(w, rows_of(ROWS), runtime=Runtime(epoch))
    assert split.stats().replays == 1
    return split, w


def test_advancing_clears_every_capture_and_no_executable():
    epoch = Epoch()
    split, w = captured(epoch)
    before = split(w, rows_of(ROWS), runtime=Runtime(epoch))
    count = compilations()
    epoch.advance()
    assert all(entry.capture is None and entry.warmups == 0 for entry in split.program().entries)
    again = [split(w, rows_of(ROWS), runtime=Runtime(epoch)) for _ in range(3)]
    for result in again:
        assert_same(result, before)
    assert compilations() == count
    stats = split.stats()
    assert (stats.warmups, stats.captures, stats.replays, stats.invalidations) == (2, 2, 3, 1)


def test_a_capture_that_was_not_cleared_raises_instead_of_replaying(monkeypatch):
    """Stands for a runner that the clear has missed: the epoch catches it."""
    epoch = Epoch()
    split, w = captured(epoch)
    monkeypatch.setattr(type(split._runners[0]), "clear", lambda self: None)
    epoch.advance()
    for _ in range(2):
        with pytest.raises(StaleCaptureError, match=f"the capture of {ROWS} rows belongs to epoch 0"):
            split(w, rows_of(ROWS), runtime=Runtime(epoch))


def test_a_runtime_of_an_earlier_life_is_refused():
    epoch = Epoch()
    split, w = captured(epoch)
    old = Runtime(epoch)
    epoch.advance()
    for call in (split, split.eager):
        with pytest.raises(StaleCaptureError, match="the runtime of this call belongs to epoch 0"):
            call(w, rows_of(ROWS), runtime=old)


def test_two_functions_share_resources():
    epoch = Epoch()
    (one, w), (two, v) = captured(epoch), captured(epoch)
    results = one(w, rows_of(ROWS), runtime=Runtime(epoch)), two(v, rows_of(ROWS), runtime=Runtime(epoch))
    epoch.advance()
    for split in (one, two):
        assert split.stats().captured == 0
    assert_same(one(w, rows_of(ROWS), runtime=Runtime(epoch)), results[0])
    assert_same(two(v, rows_of(ROWS), runtime=Runtime(epoch)), results[1])


def test_other_resources_are_captured_anew_and_not_mixed_up():
    first, second = Epoch(), Epoch()
    split, w = captured(first)
    split(w, rows_of(ROWS), runtime=Runtime(second))
    assert split.stats().captures == 2
    first.advance()  # belongs to nothing captured any more, clears all the same
    second.advance()
    assert split(w, rows_of(ROWS), runtime=Runtime(second)).shape == (ROWS, 3)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_resources_replaced_while_a_call_runs(calls):
    """In the warm-up, while capturing and in a replay: the call raises, and the next one is right."""
    epoch = Epoch()
    replace = [False]
    name = "test_replacing"

    def host(call, x):
        if replace[0]:
            replace[0] = False
            epoch.advance()
        return x + 1

    swap = boundary(name, abstract=lambda x: x)(host)
    try:
        split = segmented(lambda _, x: into(swap(into(x)) * 2), boundaries=(*NAMES, name))
        x = rows_of(ROWS)
        expected = None
        for number in range(1, calls + 1):
            replace[0] = number == calls
            if replace[0]:
                with pytest.raises(StaleCaptureError, match="this call belongs to epoch 0"):
                    split(None, x, runtime=Runtime(epoch))
            else:
                expected = split(None, x, runtime=Runtime(epoch))
        for _ in range(3):
            got = split(None, x, runtime=Runtime(epoch))
            np.testing.assert_allclose(got, 2 * ((2 * x + 1) * 2), rtol=1e-6)
            assert expected is None or np.array_equal(got, expected)
    finally:
        unregister_boundary(name)


def test_an_error_caused_by_freed_resources_is_stale_and_not_a_boundary_error():
    epoch, name = Epoch(), "test_freeing"

    def host(call, x):
        epoch.advance()
        raise RuntimeError("Array has been deleted")

    free = boundary(name, abstract=lambda x: x)(host)
    try:
        split = segmented(lambda _, x: free(into(x)), boundaries=(*NAMES, name))
        with pytest.raises(StaleCaptureError, match=f"'{name}' .*resized or released while it ran"):
            split(None, rows_of(ROWS), runtime=Runtime(epoch))
    finally:
        unregister_boundary(name)


def test_calls_in_flight_from_other_threads_finish_or_raise():
    epoch = Epoch()
    split, w = captured(epoch)
    x = rows_of(ROWS)
    expected = np.asarray(split(w, x, runtime=Runtime(epoch)))
    outcomes, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            try:
                outcomes.append(np.array_equal(split(w, x, runtime=Runtime(epoch)), expected))
            except StaleCaptureError:
                outcomes.append(None)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        epoch.advance()
        split.invalidate()
    while sum(o is not None for o in outcomes) < 10:
        pass
    stop.set()
    for thread in threads:
        thread.join()
    assert False not in outcomes
    assert np.array_equal(split(w, x, runtime=Runtime(epoch)), expected)


def test_resources_replaced_between_the_last_step_and_the_capture(monkeypatch):
    """The advance comes just before the capture is watched: it must not stay behind as stale for good."""
    epoch = Epoch()
    split = segmented(stack)
    w, x = weights(2), rows_of(ROWS)
    first = split(w, x, runtime=Runtime(epoch))
    watch = Epoch.watch

    def late(self, watcher):
        monkeypatch.setattr(Epoch, "watch", watch)
        self.advance()
        watch(self, watcher)

    monkeypatch.setattr(Epoch, "watch", late)
    with pytest.raises(StaleCaptureError, match="this capture belongs to epoch 0"):
        split(w, x, runtime=Runtime(epoch))
    for _ in range(3):
        assert_same(split(w, x, runtime=Runtime(epoch)), first)
    assert split.stats().replays == 1


def test_threads_with_other_weights_never_mix():
    """One call finds a capture while another call captures other weights over it: it must not use either's mixture."""
    split = segmented(stack, warmups=0)
    x = rows_of(ROWS)
    sets = [weights(2, seed=s) for s in range(3)]
    expected = [np.asarray(segmented(stack)(w, x)) for w in sets]
    wrong = []

    def serve(number):
        for turn in range(30):
            which = (number + turn // 3) % 3
            if not np.array_equal(split(sets[which], x), expected[which]):
                wrong.append((number, turn))

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_invalidate_lets_go_of_weights_and_functions_are_held_by_no_epoch():
    epoch = Epoch()
    split = segmented(lambda w, x: into(x @ w))
    w = weights(1)[0] + 0
    for _ in range(3):
        split(w, rows_of(ROWS), runtime=Runtime(epoch))
    alive = weakref.ref(w)
    del w
    gc.collect()
    assert alive() is not None  # captured
    epoch.advance()
    gc.collect()
    assert alive() is None
    runner = weakref.ref(split._runners[0])
    split(weights(1)[0], rows_of(ROWS), runtime=Runtime(epoch))
    del split
    gc.collect()
    assert runner() is None


def test_many_cycles_leak_nothing():
    epoch = Epoch()
    split, w = captured(epoch)
    x = rows_of(ROWS)

    def cycle():
        epoch.advance()
        for _ in range(3):
            split(w, x, runtime=Runtime(epoch))

    for _ in range(5):
        cycle()
    gc.collect()
    arrays, objects, count = len(jax.live_arrays()), len(gc.get_objects()), compilations()
    for _ in range(200):
        cycle()
    gc.collect()
    assert len(jax.live_arrays()) <= arrays
    assert len(gc.get_objects()) <= objects + 200
    assert compilations() == count and len(epoch._watchers) == len(split._runners) + 1


def test_recapture_without_an_epoch():
    split = segmented(stack)
    w = weights(2)
    first = [split(w, rows_of(ROWS)) for _ in range(3)][-1]
    split.invalidate()
    assert split.stats().captured == 0 and split.stats().invalidations == 1
    assert_same([split(w, rows_of(ROWS)) for _ in range(3)][-1], first)
    assert jnp.isfinite(first).all()


def test_new_weights_let_the_old_ones_go_in_every_bucket():
    split = segmented(lambda w, x: into(x @ w), buckets=(2, ROWS))
    w = weights(1)[0] + 0
    for rows in (2, ROWS):
        for _ in range(3):
            split(w, rows_of(rows))
    assert split.stats().captured == 2
    alive = weakref.ref(w)
    w = weights(1, seed=1)[0]
    split(w, rows_of(2))
    gc.collect()
    assert alive() is None
    for _ in range(2):
        np.testing.assert_allclose(split(w, rows_of(ROWS)), 2 * (rows_of(ROWS) @ w), rtol=1e-5)
    assert split.stats().captured == 2
