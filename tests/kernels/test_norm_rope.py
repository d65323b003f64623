"""norm_rope: the reference against NumPy in float64, the kernel against the reference, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_lowering import KERNEL, SHAPE, lowered

import minimax_kernels as mk
from minimax_kernels.implementation import _with_gradient_of
from minimax_kernels.norm_rope import reference

EPS = 1e-6
INTERPRETED = "pallas_triton_interpret"
LAYERS = {  # tokens, (heads, channels) of each array, half
    "one rank": (5, ((8, 128), (1, 128)), 32),
    "dense layer, channels no power of two": (7, ((4, 24), (2, 24)), 5),
    "one array, all channels turn": (2, ((3, 16),), 8),
}


def inputs(name, dtype):
    tokens, arrays, half = LAYERS[name]
    random = np.random.default_rng(2)
    xs = tuple(jnp.asarray(3 * random.standard_normal((tokens, *array)), dtype) for array in arrays)
    weights = tuple(jnp.asarray(random.standard_normal(channels), dtype) for _, channels in arrays)
    angles = random.uniform(0, 1e4, (tokens, half))
    return xs, weights, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def in_numpy(x, weight, cos, sin):
    x, weight, cos, sin = (np.asarray(a, np.float64) for a in (x, weight, cos, sin))
    half, out = cos.shape[1], x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * (1 + weight)
    low, high = out[..., :half].copy(), out[..., half : 2 * half].copy()
    out[..., :half] = low * cos[:, None] - high * sin[:, None]
    out[..., half : 2 * half] = high * cos[:, None] + low * sin[:, None]
    return out


def run(impl, *args):
    return jax.jit(functools.partial(mk.norm_rope, eps=EPS, impl=impl))(*args)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in LAYERS), ("one rank", "bfloat16")])
def test_values(name, dtype):
    """bfloat16: the norm is rounded, then the result; sums in another order may round one of them the other way."""
    args = inputs(name, dtype)
    xs, weights, cos, sin = args
    results, kernel = run("reference", *args), run(INTERPRETED, *args)
    for x, weight, result, other in zip(xs, weights, results, kernel, strict=True):
        assert result.dtype == other.dtype == dtype and result.shape == other.shape == x.shape
        expected, top = in_numpy(x, weight, cos, sin), float(jnp.abs(result).max())
        step = 2.0**-22 if dtype == "float32" else 2.0**-8
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=2 * step * top)
        np.testing.assert_allclose(np.asarray(other, np.float64), np.asarray(result, np.float64), atol=step * top)
        if dtype == "bfloat16":
            assert (np.asarray(other) == np.asarray(result)).mean() > 0.99


def test_many_rows_take_wider_programs():
    xs = (jnp.asarray(np.random.default_rng(0).standard_normal((1100, 8, 16)), jnp.float32),)
    angles = jnp.arange(1100.0)[:, None] * jnp.ones((1, 4))
    args = xs, (jnp.zeros(16),), jnp.cos(angles), jnp.sin(angles)
    np.testing.assert_allclose(run(INTERPRETED, *args)[0], run("reference", *args)[0], atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_it_lowers_in_one_launch(tokens):
    """float32 too: there is no product of matrices in it."""
    for dtype in ("bfloat16", "float32")[: 1 if tokens > 1 else 2]:
        xs = tuple(SHAPE((tokens, heads, 128), dtype) for heads in (64, 4, 4, 1))
        angles = SHAPE((tokens, 32), jnp.float32)
        text = lowered("norm_rope", xs, (SHAPE((128,), dtype),) * 4, angles, angles, eps=EPS)
        assert text.count(KERNEL) == 1


def test_gradients_are_the_references():
    """Of what stands in for the kernel, which has none itself."""
    xs, weights, cos, sin = inputs("one array, all channels turn", "float32")

    def opaque(xs, *_):
        return jax.tree.map(lambda x: jax.pure_callback(np.zeros_like, jax.ShapeDtypeStruct(x.shape, x.dtype), x), xs)

    def loss(function, xs, weights):
        return sum((x * jnp.arange(x.size).reshape(x.shape)).sum() for x in function(xs, weights, cos, sin))

    plain = functools.partial(reference.norm_rope, eps=EPS)
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, function), argnums=(0, 1)))(xs, weights)
        for function in (_with_gradient_of(plain, opaque, {}), plain)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))


def test_arguments_that_do_not_fit_are_named():
    xs, weights, cos, sin = inputs("one array, all channels turn", "float32")
    for changes, message in (
        ({"xs": ()}, "weights: 1 of them, must be 0"),
        ({"weights": weights * 2}, "weights: 2 of them, must be 1"),
        ({"xs": (xs[0][0],)}, r"xs\[0\] has shape \(3, 16\): must be \[T, H, D\]"),
        ({"xs": (xs[0].astype(int),)}, r"xs\[0\] is int32: must be one of"),
        ({"xs": (xs[0][:1],)}, r"xs\[0\] has T = 1: must be 2, as in cos"),
        ({"weights": (weights[0][:8],)}, r"weights\[0\] has D = 8: must be 16"),
        ({"sin": sin[:1]}, r"sin has shape \(1, 8\): must be \(2, 8\), as cos"),
        ({"cos": jnp.ones((2, 9)), "sin": jnp.ones((2, 9))}, r"cos has half = 9: must be within 1\.\.8,"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.norm_rope(**{"xs": xs, "weights": weights, "cos": cos, "sin": sin, "eps": EPS, **changes})
    wide = jnp.ones((2, 1, 2048))
    with pytest.raises(NotImplementedError, match=r"xs\[0\] has D = 2048"):
        mk.norm_rope((wide,), (jnp.ones(2048),), cos, sin, eps=EPS, impl=INTERPRETED)
