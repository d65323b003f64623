"""project_norm_rope: its kernels against the operations that it is made of, derivatives, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_norm_rope import in_numpy
from test_pallas_lowering import KERNEL, SHAPE, lowered, mxfp8
from test_weight_products import rows_of, weight

import minimax_kernels as mk
from minimax_kernels.implementation import _with_gradient_of
from minimax_kernels.matmul_launches import matmul_launch
from minimax_kernels.project_norm_rope import reference
from minimax_kernels.project_norm_rope.composed import composed
from minimax_kernels.project_norm_rope.pallas_triton import MOST_TOKENS

EPS = 1e-6
INTERPRET = "pallas_triton_interpret"


def inputs(tokens, features, heads, dims, half, *, quantised=True, seed=0):
    """(arguments, projections in float64): q, k, v and, where there are five of `heads`, the index branch's q and k."""
    random = np.random.default_rng(seed)
    weights, wide = zip(
        *(weight(random, features, count * dim, quantised=quantised) for count, dim in zip(heads, dims, strict=True)),
        strict=True,
    )
    norms = tuple(
        None if i == 2 else jnp.asarray(random.standard_normal(dim), jnp.bfloat16) for i, dim in enumerate(dims)
    )
    angles = random.uniform(0, 1e4, (tokens, half))
    tables = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    return (rows_of(random, tokens, features), weights, norms, *tables), wide


@functools.cache
def jitted(impl, detached=0):
    return jax.jit(functools.partial(mk.project_norm_rope, eps=EPS, detached=detached, impl=impl))


@jax.jit
def by_its_parts(*args):
    """The kernels of `matmul` and `norm_rope`, one after the other."""
    matmul, norm_rope = (functools.partial(op, impl=INTERPRET) for op in (mk.matmul, mk.norm_rope))
    return composed(matmul, norm_rope, *args, eps=EPS, detached=0)


def check_against_parts(*args, **options):
    """The bits of values; elsewhere the order of the mean's sum may round a few numbers the other way."""
    args, _ = inputs(*args, **options)
    for result, expected, norm in zip(jitted(INTERPRET)(*args), by_its_parts(*args), args[2], strict=True):
        assert result.dtype == expected.dtype == jnp.bfloat16 and result.shape == expected.shape
        result, expected = np.asarray(result, np.float32), np.asarray(expected, np.float32)
        differ = np.count_nonzero(result != expected)
        assert differ <= (0 if norm is None else 2 + result.size // 500)
        np.testing.assert_allclose(result, expected, rtol=0, atol=2**-6 * np.abs(expected).max())


@pytest.mark.parametrize("splits", [2, 1])
def test_results_are_those_of_its_parts(splits):
    """Splits that the second kernel adds up, with an index branch of its own width; and none, without."""
    assert matmul_launch(1, 256, 64, 384).splits == 2 and matmul_launch(5, 64, 64, 320, quantized=False).splits == 1
    if splits > 1:
        check_against_parts(1, 256, (2, 1, 1, 1), (64, 64, 64, 128), 32)
    else:
        check_against_parts(5, 64, (3, 1, 1), (64, 64, 64), 24, quantised=False)


@pytest.mark.long
def test_results_are_those_of_its_parts_whatever_the_shapes():
    @settings(max_examples=40, deadline=None)
    @given(
        tokens=st.integers(1, 64),
        features=st.sampled_from([64, 256, 1024, 2048]),  # 1, 2, 8 and 16 splits
        q_heads=st.integers(1, 8),
        kv_heads=st.integers(1, 2),
        dim=st.sampled_from([64, 128]),
        half=st.sampled_from([8, 24, 32]),
        index=st.booleans(),
        quantised=st.booleans(),
    )
    def check(tokens, features, q_heads, kv_heads, dim, half, index, quantised):
        heads = (q_heads, kv_heads, kv_heads, *((kv_heads, 1) if index else ()))
        check_against_parts(tokens, features, heads, (dim,) * len(heads), half, quantised=quantised)

    check()


def test_the_reference_is_right():
    """Against NumPy in float64, with an index branch of its own width."""
    heads = (3, 2, 2, 2, 1)
    args, wide = inputs(3, 32, heads, (32, 32, 32, 48, 48), 5)
    x, _, norms, cos, sin = args
    for i, (result, norm, count) in enumerate(zip(jitted(None)(*args), norms, heads, strict=True)):
        expected = (np.asarray(x, np.float64) @ wide[i]).reshape(3, count, -1)
        if norm is not None:
            expected = in_numpy(expected, norm, cos, sin)
        assert result.shape == expected.shape and result.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=2**-6 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [1, MOST_TOKENS])
def test_few_rows_are_two_launches(tokens):
    """One TP8 rank's, whose inputs are split, and TP1's, whose are not; nothing is joined in between."""
    angles, norm = SHAPE((tokens, 32), jnp.float32), SHAPE((128,), "bfloat16")
    for heads in ((8, 1, 1, 1, 1), (64, 4, 4, 4, 1)):
        weights = tuple(mxfp8(6144, 128 * count) for count in heads)
        args = SHAPE((tokens, 6144), "bfloat16"), weights, (norm, norm, None, norm, norm), angles, angles
        text = lowered("project_norm_rope", *args, eps=EPS)
        assert text.count(KERNEL) == 2 and "concatenate" not in text


def test_arrays_are_two_launches_and_many_rows_the_operations_own():
    norm = SHAPE((128,), "bfloat16")
    arrays = tuple(SHAPE((6144, 128 * count), "bfloat16") for count in (8, 1, 1))
    for tokens, weights, launches in ((8, arrays, 2), (300, tuple(mxfp8(*w.shape) for w in arrays), 3)):
        angles = SHAPE((tokens, 32), jnp.float32)
        args = SHAPE((tokens, 6144), "bfloat16"), weights, (norm, norm, None), angles, angles
        assert lowered("project_norm_rope", *args, eps=EPS).count(KERNEL) == launches


def test_gradients_are_the_references():
    """Of what stands in for the kernels, which have none; detached products give x none, their weights theirs."""
    args, _ = inputs(3, 32, (2, 1, 1, 1, 1), (16,) * 5, 4, quantised=False)
    x, weights, norms, cos, sin = jax.tree.map(lambda a: a.astype(jnp.float32), args)
    static = {"eps": EPS, "detached": 2}
    shapes = jax.eval_shape(functools.partial(mk.project_norm_rope, **static), x, weights, norms, cos, sin)

    def opaque(*_, **__):
        return jax.pure_callback(lambda: tuple(np.zeros(s.shape, s.dtype) for s in shapes), shapes)

    def loss(function, outputs, x, weights, norms):
        heads = function(x, weights, norms, cos, sin)[outputs]
        return sum((head * jnp.arange(head.size).reshape(head.shape)).sum() for head in heads)

    def gradients(function, outputs=slice(None)):
        return jax.jit(jax.grad(functools.partial(loss, function, outputs), argnums=(0, 1, 2)))(x, weights, norms)

    plain = functools.partial(mk.project_norm_rope, **static)
    stand_in = _with_gradient_of(reference.project_norm_rope, opaque, static)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), gradients(stand_in), gradients(plain))
    of_x, of_weights, of_norms = gradients(plain, slice(3, None))
    assert not np.any(of_x) and all(np.any(g) for g in (*of_weights[3:], *of_norms[3:]))


def test_eight_bits_are_detached_behind_one_product():
    """x alone gets no derivative: the norms behind the product still learn."""
    (x, weights, norms, cos, sin), _ = inputs(3, 32, (2, 1, 1, 1, 1), (16,) * 5, 4)

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(x, norms, detached):
        heads = mk.project_norm_rope(x, weights, norms, cos, sin, eps=EPS, detached=detached)
        return sum(head.astype(jnp.float32)[..., 0].sum() for head in heads[3:])

    for detached in (0, 2):
        of_x, of_norms = gradients(x, norms, detached)
        assert np.any(of_x) == (not detached) and np.any(of_norms[3]) and np.any(of_norms[4])


def test_no_rows_are_no_launch():
    args, _ = inputs(0, 32, (2, 1, 1), (16,) * 3, 4)
    assert [heads.shape for heads in jitted(INTERPRET)(*args)] == [(0, 2, 16), (0, 1, 16), (0, 1, 16)]


def test_arguments_that_do_not_fit_are_named():
    (x, weights, norms, cos, sin), _ = inputs(2, 32, (2, 1, 1), (16,) * 3, 4)
    for changes, message in (
        ({"x": x[0]}, r"x has shape \(32,\): must be \[T, K\]"),
        ({"x": x.astype(int)}, "x is int32: must be one of"),
        ({"weights": (), "norms": ()}, "norms: 0 of them, must be 0, one for each of weights, at least one"),
        ({"norms": norms[:2]}, "norms: 2 of them, must be 3"),
        ({"norms": (None, *norms[1:])}, r"norms\[0\] = None: must be \[D\]"),
        ({"norms": (norms[0], norms[1][None], None)}, r"norms\[1\] has shape \(1, 16\): must be \[D\]"),
        (
            {"norms": (norms[0], jnp.ones(12), None)},
            r"weights\[1\]'s N = 16: must be a multiple of norms\[1\]'s D = 12",
        ),
        (
            {"norms": (jnp.ones(32), norms[1], None)},
            r"weights\[2\]'s N = 16: must be a multiple of norms\[0\]'s D = 32",
        ),
        ({"weights": (weights[0], weights[1], jnp.ones((64, 16)))}, r"x has K = 32: must be 64, as in weights\[2\]"),
        ({"weights": (weights[0], weights[1], jnp.ones(16))}, r"weights\[2\] has shape \(16,\): must be \[K, N\]"),
        ({"detached": 4}, r"detached = 4: must be within 0\.\.3"),
        ({"cos": cos[:1], "sin": sin[:1]}, "cos has T = 1: must be 2, as in x"),
        ({"sin": sin[:1]}, r"sin has shape \(1, 4\): must be \(2, 4\), as cos"),
        ({"cos": jnp.ones((2, 9)), "sin": jnp.ones((2, 9))}, r"cos has half = 9: must be within 1\.\.8, .* norms\[0\]"),
    ):
        args = {"x": x, "weights": weights, "norms": norms, "cos": cos, "sin": sin, "eps": EPS, **changes}
        with pytest.raises(ValueError, match=message):
            mk.project_norm_rope(**args)
    with pytest.raises(NotImplementedError, match="rows are float32, not bfloat16"):
        mk.project_norm_rope(x.astype(jnp.float32), weights, norms, cos, sin, eps=EPS, impl=INTERPRET)
