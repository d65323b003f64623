"""Segments over several devices: one device's body, collectives included, against the global maths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from segmented_samples import ROWS, Runtime, assert_same, compilations, rows_of, segmented

from minimax_jax.segmented import Epoch, StaleCaptureError, boundary

HIDDEN, WIDE, LAYERS = 3, 16, 4


@boundary("test_mesh_halves", output=1)
def halves(call, x, out, *, layer):
    """Each device halves its own part, in place; rows past the live ones are left alone."""
    assert x.shape == (call.mesh.size, *x.shape[1:]) and out.shape == x.shape
    return _halve(call.mesh)(x, out, call.live)


@functools.lru_cache
def _halve(mesh):
    spec = P(tuple(mesh.axis_names))

    def body(x, out, live):
        return jnp.where(jnp.arange(x.shape[1])[:, None] < live, x / 2, out)

    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=(spec, spec, P()), out_specs=spec, check_vma=False), donate_argnums=1
    )


@boundary("test_mesh_ranks", abstract=lambda x: x)
def ranks(call, x):
    """Adds the device's number, with NumPy; its operand may be an argument or a literal."""
    x = np.asarray(x)
    return x + np.arange(call.mesh.size, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def layers(ws, x):
    """Columns, then rows of a matrix a device, summed up: an MLP under tensor parallelism."""
    for layer, (up, down) in enumerate(ws):
        inner = jnp.tanh(x @ up)
        inner = halves(inner, jnp.full(inner.shape, -1.0), layer=layer)
        x = x + jax.lax.psum(inner @ down, "tp")
    return {"x": x, "shared": ranks(x).sum(0), "given": ws[0][0]}


def weights():
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS)
    ups = [jax.random.normal(key, (HIDDEN, WIDE)) for key in keys[:LAYERS]]
    downs = [jax.random.normal(key, (WIDE, HIDDEN)) for key in keys[LAYERS:]]
    return list(zip(ups, downs, strict=True))


def expected(ws, x):
    for up, down in ws:
        x = x + jnp.tanh(x @ up) / 2 @ down
    return x


def mesh_of(*shape):
    names = ("tp",) if len(shape) == 1 else ("dp", "tp")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def placed(mesh):
    columns, rows = NamedSharding(mesh, P(None, "tp")), NamedSharding(mesh, P("tp", None))
    return [(jax.device_put(up, columns), jax.device_put(down, rows)) for up, down in weights()]


def on(mesh, fn=layers, **options):
    given = {
        "boundaries": ("test_mesh_halves", "test_mesh_ranks"),
        "mesh": mesh,
        "in_specs": ((P(None, "tp"), P("tp", None)), P()),
        "out_specs": {"x": P(), "shared": P(tuple(mesh.axis_names)), "given": P(None, "tp")},
    }
    return segmented(fn, **{**given, **options})


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_a_body_with_collectives_equals_the_global_maths(shape):
    mesh = mesh_of(*shape)
    ws, x = placed(mesh), rows_of(ROWS)
    # specs are a prefix: one pair for all layers' pairs
    split = on(mesh, in_specs=([(P(None, "tp"), P("tp", None))] * LAYERS, P()))
    results = [split(ws, x) for _ in range(3)]
    for result in results[1:]:
        assert_same(result, results[0])
    np.testing.assert_allclose(results[0]["x"], expected(weights(), x), rtol=1e-4, atol=1e-5)
    assert_same(results[0]["given"], ws[0][0])
    total = np.asarray(results[0]["x"]).sum(0)
    shared = np.asarray(results[0]["shared"]).reshape(8, HIDDEN)
    np.testing.assert_allclose(shared, total + ROWS * np.arange(8)[:, None], rtol=1e-3, atol=1e-3)
    assert results[0]["x"].sharding.is_fully_replicated and split.stats().executables == 5
    before = compilations()
    split(ws, x)
    assert compilations() == before and split.stats().replays == 2


def test_padding_eager_and_invalidation_work_over_a_mesh():
    mesh = mesh_of(8)
    ws, epoch = placed(mesh), Epoch()
    split = on(mesh, in_specs=([(P(None, "tp"), P("tp", None))] * LAYERS, P()))
    x = rows_of(ROWS - 2)
    for _ in range(3):
        got = split(ws, x, runtime=Runtime(epoch))["x"]
        np.testing.assert_allclose(got[: ROWS - 2], expected(weights(), x), rtol=1e-4, atol=1e-5)
    stale = Runtime(epoch)
    epoch.advance()
    with pytest.raises(StaleCaptureError):
        split(ws, x, runtime=stale)
    np.testing.assert_allclose(split(ws, x, runtime=Runtime(epoch))["x"], got, rtol=1e-6)
    np.testing.assert_allclose(split.eager(ws, x)["x"], got[: ROWS - 2], rtol=1e-5, atol=1e-6)


def test_boundaries_take_arguments_and_literals():
    mesh = mesh_of(8)
    split = on(
        mesh,
        lambda w, x: (ranks(x), ranks(jnp.float32(2.0)).reshape(1), ranks(w)),
        in_specs=(P("tp"), P()),
        out_specs=(P("tp"), P("tp"), P("tp")),
    )
    x, w = rows_of(ROWS), jnp.arange(16.0)
    for _ in range(3):
        one, two, three = split(jax.device_put(w, NamedSharding(mesh, P("tp"))), x)
    np.testing.assert_allclose(one, np.concatenate([x + i for i in range(8)]), rtol=1e-6)
    np.testing.assert_allclose(two, 2.0 + np.arange(8))
    np.testing.assert_allclose(three, np.arange(16) + np.repeat(np.arange(8), 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_specs": None}, "mesh, in_specs and out_specs: give all three"),
        ({"in_specs": ("tp", P())}, "in_specs holds str: must be jax.sharding.PartitionSpec"),
        ({"in_specs": (P("tp"), P("tp"))}, "for an argument in rows: axis 0 must not be sharded"),
        ({"in_specs": (P("tp"), P())}, r"shape \(3, 16\): axis 0 must divide by 8"),
    ],
)
def test_specs_that_do_not_fit_are_named(options, message):
    mesh = mesh_of(8)
    with pytest.raises(ValueError, match=message):
        on(mesh, **options)(placed(mesh), rows_of(ROWS))
