"""Boundaries: the registry, the ways to call them, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmented_samples import NAMES, bump, into, pair, rows_of, scale, segmented

from minimax_jax.segmented import (
    BoundaryError,
    BoundaryResultError,
    UnknownBoundaryError,
    boundary,
    get_boundary,
    unregister_boundary,
)


@pytest.fixture
def name():
    yield "test_passing"
    unregister_boundary("test_passing")


def test_the_registry_knows_names_and_nothing_else(name):
    assert get_boundary("nobody's") is None
    assert get_boundary(NAMES[0]) is scale
    registered = boundary(name, abstract=lambda x: x)(lambda call, x: x)
    assert get_boundary(name) is registered
    with pytest.raises(ValueError, match=f"{name!r} is registered already"):
        boundary(name, abstract=lambda x: x)(lambda call, x: x)
    boundary(name, abstract=lambda x: x, replace=True)(lambda call, x: x)
    with pytest.raises(ValueError, match="give abstract or output"):
        boundary("other")


def test_a_direct_call_runs_the_host_function_and_spares_its_operands():
    x, state = jnp.asarray(rows_of(2)), jnp.ones((2, 3))
    np.testing.assert_allclose(into(x, 1), 3 * x, rtol=1e-6)
    bump(state, x)
    assert not state.is_deleted()


def test_plain_jit_calls_back_and_gives_the_same():
    def fn(x):
        both = pair({"a": into(x, 1)}, x * 2)
        return both["sum"] + both["swapped"][0], bump(x, x)

    x = rows_of(4)
    got, expected = jax.jit(fn)(x), fn(jnp.asarray(x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_plain_jit_keeps_order_and_calls_without_a_reader(name):
    seen = []
    mark = boundary(name, abstract=lambda x, **_: x)(lambda call, x, *, n: (seen.append(n), x)[1])

    @jax.jit
    def fn(x):
        mark(x, n=0)
        mark(x + 1, n=1)
        return mark(x, n=2)

    jax.block_until_ready(fn(jnp.ones(3)))
    jax.effects_barrier()
    assert seen == [0, 1, 2]


def test_a_runtime_reaches_plain_calls(name):
    tell = boundary(name, abstract=lambda x: x)(lambda call, x: x * call.runtime)
    assert float(jax.jit(lambda x: tell(x, runtime=3.0))(jnp.float32(2))) == 6
    assert float(tell(jnp.float32(2), runtime=5.0)) == 10


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_gradients_and_batches_are_refused_by_name(wrap):
    fn = wrap(lambda x: into(x, 7).sum())
    with pytest.raises(NotImplementedError, match=r"'test_scale'\(layer=7\) cannot be differentiated"):
        jax.grad(fn)(jnp.ones((2, 3)))
    with pytest.raises(NotImplementedError, match=r"'test_scale'\(layer=7\) cannot be batched"):
        jax.vmap(fn)(jnp.ones((4, 2, 3)))


def test_an_output_buffer_of_another_shape_or_type_is_refused_while_tracing():
    x = jnp.ones((2, 3))
    strict = boundary("test_strict", abstract=lambda x, out: x, output=1)(lambda call, x, out: out)
    try:
        with pytest.raises(ValueError, match=r"'test_strict': output buffer has shape \(3, 2\): must be \(2, 3\)"):
            jax.eval_shape(strict, x, jnp.ones((3, 2)))
        with pytest.raises(ValueError, match="output buffer is bfloat16: must be float32"):
            jax.eval_shape(strict, x, jnp.ones((2, 3), jnp.bfloat16))
    finally:
        unregister_boundary("test_strict")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda call, x, out: jnp.zeros_like(out), "two output buffers"),
        (lambda call, x, out: out[:1], r"result has shape \(1, 3\): must be \(6, 3\)"),
        (lambda call, x, out: out.astype(jnp.bfloat16), "result is bfloat16: must be float32"),
        (lambda call, x, out: (out, out), "returned PyTreeDef"),
        (lambda call, x, out: None, "returned PyTreeDef"),
    ],
)
def test_a_wrong_result_names_boundary_segment_and_layer(name, call, message):
    bad = boundary(name, abstract=lambda x, out, **_: out, output=1)(lambda c, x, out, *, layer: call(c, x, out))
    fn = segmented(
        lambda _, x: bad(into(x * 2) + 1, jnp.zeros_like(x), layer=4), boundaries=(*NAMES, name), buckets=(6,)
    )
    where = rf"boundary '{name}'\(layer=4\) \(call 1, after segment 1, 6 rows\): "
    with pytest.raises(ValueError, match=where + message) as caught:
        fn(None, rows_of(5))
    assert isinstance(caught.value, BoundaryResultError)


def test_a_raising_boundary_is_named_and_the_function_stays_usable(name):
    failing = [True]

    def host(call, x, *, layer):
        if failing[0]:
            raise KeyError("no such plan")
        return x + 1

    bad = boundary(name, abstract=lambda x, **_: x)(host)
    fn = segmented(lambda _, x: bad(into(x), layer=2) * 2, boundaries=(*NAMES, name))
    x = rows_of(6)
    message = rf"'{name}'\(layer=2\) \(call 1, after segment 0, 6 rows\): KeyError: 'no such plan'"
    for _ in range(3):  # in the warm-up
        with pytest.raises(BoundaryError, match=message) as caught:
            fn(None, x)
        assert isinstance(caught.value.__cause__, KeyError)
    failing[0] = False
    first = fn(None, x)
    failing[0] = True
    with pytest.raises(BoundaryError, match=message):  # while capturing
        fn(None, x)
    assert fn.stats().captured == 0
    failing[0] = False
    captured, replayed = fn(None, x), fn(None, x)
    failing[0] = True
    with pytest.raises(BoundaryError, match=message):  # in a replay
        fn(None, x)
    failing[0] = False
    for result in (captured, replayed, fn(None, x)):
        np.testing.assert_array_equal(result, first)
    assert fn.stats().failures == 5 and fn.stats().replays == 2


def test_an_error_of_jax_keeps_its_kind_and_is_told_where_it_came_from(name):
    def host(call, x, *, layer):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    bad = boundary(name, abstract=lambda x, **_: x)(host)
    fn = segmented(lambda _, x: bad(into(x), layer=2) * 2, boundaries=(*NAMES, name))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no room") as caught:
        fn(None, rows_of(6))
    assert f"boundary '{name}'(layer=2) (call 1, after segment 0, 6 rows)" in caught.value.__notes__


@pytest.mark.parametrize(
    "wrap",
    [lambda fn: segmented(fn, boundaries=("test_passing",)), jax.jit, lambda fn: fn],
    ids=["split", "jit", "direct"],
)
def test_an_error_of_an_abstract_function_keeps_its_kind_and_names_the_boundary(name, wrap):
    def abstract(x, *, layer):
        if layer == 3:
            raise KeyError("no such layer")
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    bad = boundary(name, abstract=abstract)(lambda call, x, *, layer: x)
    fn = wrap(lambda _, x: bad(bad(x, layer=2), layer=3))
    with pytest.raises(KeyError, match="no such layer") as caught:
        fn(None, rows_of(6))
    assert f"boundary '{name}'(layer=3): in its abstract function" in caught.value.__notes__


def test_a_declared_result_without_shape_and_dtype_is_named(name):
    bad = boundary(name, abstract=lambda x, **_: (x, x.shape))(lambda call, x, *, layer: x)
    with pytest.raises(
        BoundaryResultError, match=rf"'{name}'\(layer=3\): its abstract function declares int: must be jax.ShapeD"
    ):
        jax.eval_shape(lambda x: bad(x, layer=3), rows_of(6))


def test_a_misspelt_boundary_is_no_split_and_is_named():
    fn = segmented(lambda _, x: into(x), boundaries=(*NAMES, "test_scal"))
    with pytest.raises(ValueError, match="boundaries has 'test_scal': must be registered, or met in lambda"):
        fn(None, rows_of(6))
    with pytest.raises(ValueError, match="boundaries has 'test_scal'"):
        fn.eager(None, rows_of(6))
    stats = fn.stats()
    assert stats.failures == 2 and stats.buckets == ()


def test_a_boundary_that_consumes_other_operands_later_is_refused(name):
    """It would be given the caller's own weight to delete."""
    host = {"abstract": lambda w, x, **_: x, "replace": True}
    kept = boundary(name, **host)(lambda call, w, x: x + w)
    fn = segmented(lambda w, x: kept(w, into(x)) * 2, boundaries=(*NAMES, name))
    w, x = jnp.float32(2), rows_of(6)
    expected = fn(w, x)
    boundary(name, **host)(lambda call, w, x: x + w)
    np.testing.assert_array_equal(fn(w, x), expected)
    boundary(name, mutates=(0,), **host)(lambda call, w, x: x + w)
    with pytest.raises(BoundaryError, match=f"boundary '{name}': was registered anew, with other operands"):
        fn(w, x)


@pytest.mark.parametrize("rows", [5, 8])
def test_transformations_of_a_split_function_are_refused(rows):
    fn = segmented(lambda w, x: into(x * w), buckets=(8,))
    w, x = jnp.float32(2), jnp.asarray(rows_of(rows))
    for transformed in (
        jax.jit(fn), jax.vmap(fn, in_axes=(0, None)), lambda w, x: jax.grad(lambda w: fn(w, x).sum())(w[0]),
        lambda w, x: jax.jit(lambda x: fn(w[0], x))(x),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"segmented_jit was called inside jax\.jit, grad, vmap"):
            transformed(w[None], x)


def test_weak_types_are_those_of_jit():
    """A float32 that JAX made of a Python number gives way to bfloat16, also as an argument."""

    def fn(w, x):
        return into((x * w).astype(x.dtype)) * w

    weak = jax.jit(lambda: jnp.sin(2.0))()
    assert weak.weak_type
    x = jnp.asarray(rows_of(6), jnp.bfloat16)
    split = segmented(fn)
    for w in (weak, jnp.float32(0.5), weak, 0.25):
        for _ in range(3):
            found = split(w, x)
            expected = jax.jit(fn)(w, x)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found[:6], expected)


def test_an_unregistered_boundary_is_named_wherever_it_is_missed(name):
    gone = boundary(name, abstract=lambda x, **_: x)(lambda call, x, *, layer: x)
    fn = segmented(lambda _, x: gone(into(x), layer=9), boundaries=(*NAMES, name))
    x = rows_of(6)
    for _ in range(3):
        fn(None, x)
    unregister_boundary(name)
    with pytest.raises(UnknownBoundaryError, match=rf"'{name}'\(layer=9\) .*after segment 0.*is registered"):
        fn(None, x)
    other = segmented(lambda _, x: gone(into(x), layer=9), boundaries=(*NAMES, name))
    with pytest.raises(LookupError, match=rf"'{name}'\(layer=9\) after segment 0: no boundary of this name"):
        other(None, x)
    boundary(name, abstract=lambda x, **_: x)(lambda call, x, *, layer: x)
    assert fn(None, x).shape == (6, 3)
