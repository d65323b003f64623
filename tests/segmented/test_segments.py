"""Splitting and replaying: random functions, liveness, buckets, live rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from segmented_samples import (
    NAMES,
    ROWS,
    WIDTH,
    Runtime,
    assert_same,
    bump,
    compilations,
    into,
    pair,
    rows_of,
    segmented,
    stack,
    weights,
)

from minimax_jax.segmented import Epoch

CONSTANT = np.linspace(-1, 1, WIDTH, dtype=np.float32)


@jax.jit
def nested(x, y):
    """A boundary inside a nested jit, called several times: its body must be written out each time anew."""
    return into(x + y, 1) - y


def loop(x, y):
    return jax.lax.fori_loop(0, 3, lambda _, z: jnp.tanh(z + y), x)


def branch(x, y):
    return jax.lax.cond(x.sum() > 0, lambda a, b: a - b, lambda a, b: a + 2 * b, x, y)


OPERATIONS = {
    "add": lambda x, y: [x + y],
    "constant": lambda x, y: [jnp.tanh(x * CONSTANT)],
    "loop": lambda x, y: [loop(x, y)],
    "branch": lambda x, y: [branch(x, y)],
    "softmax": lambda x, y: [jax.nn.softmax(x), jax.nn.relu(y)],
    "scale": lambda x, y: [into(x)],
    "pair": lambda x, y: jax.tree.leaves(pair({"a": x}, y)),
    "same twice": lambda x, y: jax.tree.leaves(pair({"a": x}, x)),
    "bump": lambda x, y: list(bump(x, y)),
    "bump itself": lambda x, y: list(bump(x, x)),
    "nested": lambda x, y: [nested(x, y)],
    "checkpoint": lambda x, y: [jax.checkpoint(nested)(x, y)],
    "unread": lambda x, y: [(into(x, 3), bump(y, x), y)[2]],
}
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=7
)


def build(steps, outputs):
    def fn(w, x):
        values = [x, x @ w]
        for name, first, second in steps:
            values += OPERATIONS[name](values[first % len(values)], values[second % len(values)])
        return {"results": [values[i % len(values)] for i in outputs], "weights": w, "three": 3.0}

    return fn


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_random_functions_replay_to_what_they_compute(steps, outputs):
    """Whatever the boundaries' order: first, last, in a row, unread, with what they consume read again later."""
    fn = build(steps, outputs)
    w, x = weights(1)[0], rows_of(ROWS)
    split = segmented(fn)
    eager, captured, replayed = split(w, x), split(w, x), split(w, x)
    assert_same(eager, captured)
    assert_same(eager, replayed)
    expected = fn(w, jnp.asarray(x))  # operation by operation, boundaries called directly
    for a, b in zip(jax.tree.leaves(replayed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert not w.is_deleted()
    assert_same(replayed, split.eager(w, x))


def test_segments_are_cut_at_boundaries_and_carry_what_is_alive():
    def fn(w, x):
        dead = jnp.sin(x)
        a = jnp.cos(x)
        b = into(a @ w)
        c = into(b + a)
        return into(c), dead * 0 + c

    split = segmented(fn)
    split(weights(1)[0], rows_of(ROWS))
    steps = split.program().split
    assert [type(step).__name__ for step in steps.steps] == ["Segment", "Crossing"] * 3 + ["Segment"]
    first, second, *_ = steps.segments
    assert len(first.outvars) == 4  # a, a @ w, the buffer, sin(x)
    assert len(second.invars) == 2 and sum(second.donated) == 2  # b and a die here, and two results take their room


def test_what_nothing_reads_is_not_computed():
    split = segmented(lambda _, x: (jnp.linalg.norm(jnp.exp(x)), into(x))[1])
    split(None, rows_of(ROWS))
    names = [eqn.primitive.name for segment in split.program().split.segments for eqn in segment.eqns]
    assert "exp" not in names and "custom_jvp_call" not in names


def test_intermediates_are_given_up_and_arguments_kept():
    w, x = weights(3), jnp.asarray(rows_of(ROWS))
    split = segmented(stack)
    for _ in range(3):
        split(w, x)
    assert not x.is_deleted() and not any(leaf.is_deleted() for leaf in w)
    given_away = segmented(lambda state, x: (into(x), state + x), donate=0)
    state = jnp.ones((ROWS, WIDTH))
    given_away(state, x)
    assert state.is_deleted()


@pytest.mark.parametrize(("live", "bucket"), [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_rows_are_padded_to_the_next_bucket_and_padding_is_never_written(live, bucket):
    """The buffer is full of -1 before each boundary; the rows past the live ones still are afterwards."""
    split = segmented(lambda _, x: into(x), buckets=(8, 4))
    x = rows_of(live)
    for _ in range(3):
        result = np.asarray(split(None, x))
        assert result.shape == (bucket, WIDTH)
        np.testing.assert_array_equal(result[:live], 2 * x)
        assert (result[live:] == -1).all()
    assert split.stats().buckets == (bucket,) and split.stats().fallbacks == 0


def test_above_the_largest_bucket_a_call_runs_at_its_exact_size_and_says_so():
    split = segmented(stack, buckets=(4,))
    w = weights(2)
    x = rows_of(5)
    got = split(w, x)
    assert got.shape == x.shape
    np.testing.assert_allclose(got, stack(w, jnp.asarray(x)), rtol=1e-5)
    stats = split.stats()
    assert stats.fallbacks == 1 and stats.captured == 0 and stats.buckets == ()
    for size in range(5, 15):  # endless sizes do not pile up
        split(w, rows_of(size))
    assert len(split._exact) <= 4 and split.stats().executables == 0


def test_a_leaf_that_changes_is_taken_out_of_the_capture():
    split = segmented(lambda scales, x: into(x * scales["fixed"]) + scales["moving"])
    fixed = jnp.float32(2)
    x = rows_of(ROWS)
    for step in range(8):
        got = split({"fixed": fixed, "moving": jnp.float32(step)}, x)
        np.testing.assert_allclose(got, 4 * x + step, rtol=1e-6)
    assert split.stats().captures == 2 and split.stats().replays == 5
    np.testing.assert_allclose(split({"fixed": jnp.float32(3), "moving": jnp.float32(0)}, x), 6 * x, rtol=1e-6)


def test_captures_know_their_buffers_and_addresses():
    split = segmented(stack)
    w = weights(2)
    for _ in range(2):
        split(w, rows_of(ROWS))
    for entry in split.program().entries:
        capture = entry.capture
        held = {position: argument for position, argument in enumerate(capture.arguments) if argument is not None}
        assert held.keys() == capture.addresses.keys()
        for position, argument in held.items():
            assert argument.unsafe_buffer_pointer() == capture.addresses[position]
        assert len(capture.outputs) == len(capture.output_addresses)
    held = [argument for entry in split.program().entries for argument in entry.capture.arguments]
    assert all(any(leaf is argument for argument in held) for leaf in w)


def test_replays_compile_and_trace_nothing():
    split = segmented(stack, buckets=(4, 8))
    w = weights(3)
    split.warm_up(lambda rows: ((w, rows_of(rows)), None))
    before, traces = compilations(), split.stats().traces
    for live in (1, 2, 3, 4, 5, 6, 7, 8, 1, 8):
        split(w, rows_of(live, seed=live))
    assert compilations() == before and split.stats().traces == traces == 2
    assert split.stats().replays == 10 and split.stats().pairs == 30


def test_boundaries_inside_control_flow_are_refused_by_name_or_called_back():
    def fn(_, x):
        return jax.lax.fori_loop(0, 2, lambda i, y: into(y, 5), x)

    with pytest.raises(ValueError, match=r"'test_scale'\(layer=5\) stands inside (scan|while): .*unroll it"):
        segmented(fn)(None, rows_of(ROWS))
    np.testing.assert_allclose(segmented(fn, boundaries=())(None, rows_of(ROWS)), 49 * rows_of(ROWS), rtol=1e-5)


@pytest.mark.parametrize(
    ("fn", "segments"),
    [
        (lambda w, x: jnp.tanh(x @ w), 1),
        (lambda w, x: pair({"a": x}, x)["sum"], 0),
        (lambda w, x: x, 0),
    ],
    ids=["no boundary", "nothing else", "neither"],
)
def test_functions_without_a_split_warm_up_are_captured_and_replay_too(fn, segments):
    epoch, w, x = Epoch(), weights(1)[0], rows_of(ROWS - 1)
    split = segmented(fn)
    expected = fn(w, jnp.asarray(x))
    for life in (0, 1):
        for number, captured in enumerate((0, 1, 1, 1)):
            got = split(w, x, runtime=Runtime(epoch))[: ROWS - 1]
            np.testing.assert_allclose(got, expected, rtol=1e-5)
            assert split.stats().captured == captured, number
        stats = split.stats()
        assert (stats.warmups, stats.captures, stats.replays) == (1 + life, 1 + life, 2 + 2 * life)
        assert stats.segments == segments == stats.executables and stats.traces == 1
        epoch.advance()
        stats = split.stats()
        assert stats.captured == 0 and stats.invalidations == 1 + life
    assert f"{segments} segments ({segments} executables)" in split.explain()


def test_python_numbers_keep_their_weak_type():
    split = segmented(lambda scale, x: into((x * scale).astype(x.dtype)), rows=1)
    x = jnp.asarray(rows_of(ROWS), jnp.bfloat16)
    assert split(0.5, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": ()}, r"buckets = \(\): must be at least one integer"),
        ({"buckets": (0, 4)}, "must be at least one integer >= 1"),
        ({"buckets": (2.5,)}, r"buckets = \(2.5,\): must be integers"),
        ({"rows": ()}, "rows is empty"),
        ({"rows": -1}, "rows = -1: must be argument numbers"),
        ({"rows": 1, "donate": 1}, "argument 1 is in rows"),
        ({"warmups": -1}, "warmups = -1"),
        ({"boundaries": "test_scale"}, "must be a sequence of names"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        segmented(stack, **options)


def test_bad_arguments_are_named():
    split = segmented(lambda w, x, y: into(x) + y, rows=(1, 2))
    with pytest.raises(ValueError, match=r"rows = \(1, 2\): their leaves must agree in axis 0, found \[2, 3\]"):
        split(None, rows_of(2), rows_of(3))
    with pytest.raises(ValueError, match="must have at least one row"):
        split(None, rows_of(0), rows_of(0))
    with pytest.raises(ValueError, match="is a scalar"):
        split(None, 1.0, rows_of(3))
    with pytest.raises(ValueError, match="was called with 2 arguments"):
        split(None, rows_of(2))
    with pytest.raises(ValueError, match="nothing of that size was called yet"):
        split.explain(rows=7)
    two = [jax.device_put(jnp.ones((ROWS, WIDTH)), device) for device in jax.devices()[:2]]
    with pytest.raises(ValueError, match="lie on 2 devices"):
        split(None, *two)


def test_another_device_than_the_first_serves():
    device = jax.devices()[3]
    w = jax.device_put(weights(2), device)
    split = segmented(stack)
    for _ in range(3):
        result = split(w, rows_of(ROWS))
    assert result.devices() == {device}


def test_nothing_compiled_has_boundaries_left():
    split = segmented(stack, boundaries=NAMES)
    split(weights(2), rows_of(ROWS))
    for entry in split.program().entries:
        assert "callback" not in entry.executable.compiled.as_text()


def test_results_may_be_donated_whatever_they_are():
    """An argument, a constant and one value twice: none is the array that somebody else holds."""
    const = jax.numpy.arange(3.0)

    def fn(w, x):
        y = into(x)
        return w, const, x, y, y, 2.0 * const

    split = segmented(fn)
    w, x = jax.numpy.ones((2, 2)), jax.numpy.asarray(rows_of(ROWS))
    for _ in range(3):
        results = split(w, x)
        assert len({result.unsafe_buffer_pointer() for result in results}) == len(results)
        expected = [np.asarray(result) for result in (w, const, x, 2 * x, 2 * x, 2 * const)]
        for result, value in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, value, rtol=1e-6)
            result.delete()
        assert not w.is_deleted() and not x.is_deleted() and not const.is_deleted()


def test_a_caller_may_pad_for_itself():
    split = segmented(stack, buckets=(4, 8))
    w, x = weights(2), rows_of(5)
    assert [split.padded_rows(n) for n in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, 9]
    padded = jnp.zeros((8, x.shape[1])).at[:5].set(x)
    for _ in range(3):
        assert_same(split(w, padded, live=5), split(w, x))  # boundaries see five rows: sentinels from there on
    with pytest.raises(ValueError, match="live = 3: arguments of 8 rows must have 4"):
        split(w, padded, live=3)
    with pytest.raises(ValueError, match="live = 9: arguments of 8 rows must have 9"):
        split(w, padded, live=9)
    with pytest.raises(ValueError, match="live = 0"):
        split(w, padded, live=0)
