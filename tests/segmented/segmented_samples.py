"""Boundaries, functions and counters that the tests of segmented_jit share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.segmented import boundary, segmented_jit

ROWS, WIDTH = 6, 3
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: _compiled.append(name) if name == COMPILE_EVENT else None
)


def compilations() -> int:
    """XLA compilations of this process so far, by JAX's own events."""
    return len(_compiled)


@functools.partial(jax.jit, donate_argnums=1)
def fill(x, out, live, factor):
    return jnp.where(jnp.arange(out.shape[0])[:, None] < live, x * factor, out)


@boundary("test_scale", output=1)
def scale(call, x, out, *, layer):
    """Writes x * (layer + 2) to the live rows of out, in place."""
    return fill(x, out, call.live, layer + 2)


@boundary("test_pair", abstract=lambda x, y, **_: {"sum": x["a"], "swapped": (y, x["a"])})
def pair(call, x, y, *, layer=0):
    """A pytree in, a pytree out; one result is the operand itself, and one comes from NumPy."""
    return {"sum": np.asarray(x["a"]) + np.asarray(y), "swapped": (y, x["a"])}


@boundary("test_bump", abstract=lambda state, x: (state, x), mutates=(0,))
def bump(call, state, x):
    """Consumes a state, as a cache is consumed, and returns the next one."""
    return advance(state, x)


@functools.partial(jax.jit, donate_argnums=0)
def advance(state, x):
    return state + jnp.tanh(x), state * 0.5


NAMES = ("test_scale", "test_pair", "test_bump")


def into(x, layer=0):
    """`scale` with a buffer of sentinels from the segment before."""
    return scale(x, jnp.full(x.shape, -1, x.dtype), layer=layer)


def weights(layers: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), layers)
    return [jax.random.normal(key, (WIDTH, WIDTH)) for key in keys]


def rows_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def stack(ws, x):
    """Layers that are all the same but for their weights, a boundary in each."""
    for layer, w in enumerate(ws):
        x = jnp.tanh(into(x @ w, layer % 2)) + x
    return x


def segmented(fn, **options):
    return segmented_jit(fn, **{"boundaries": NAMES, "buckets": (ROWS,), "rows": 1, **options})


def assert_same(left, right):
    """Bit for bit, in structure and dtype too."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


class Runtime:
    """What boundaries find as their runtime, over resources with an epoch."""

    def __init__(self, epoch, life=None):
        self.epoch, self.life = epoch, epoch.value if life is None else life
