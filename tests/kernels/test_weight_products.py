"""Products with MXFP8 and bfloat16 weights, in Pallas's interpreter, against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_ops
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minimax_kernels as mk
from minimax_kernels.implementation import _with_gradient_of
from minimax_kernels.matmul.slabs import SLAB_ROWS, takes_slabs
from minimax_kernels.matmul.sum_splits import sum_splits
from minimax_kernels.matmul_launches import FEW_ROWS, group_launch, matmul_launch
from minimax_kernels.mxfp8_tile import dequantize_tile
from minimax_kernels.routed_experts import reference

EXAMPLES = settings(max_examples=6, deadline=None)
INTERPRET = "pallas_triton_interpret"
ACTIVATION = mk.Swiglu(1.702, 1.0, 7.0)
EXPERTS, HIDDEN, WIDTH, PER_TOKEN = 5, 256, 64, 3


def weight(random, *shape, quantised=True):
    """(weight, what it stands for in float64)."""
    *lead, inputs, outputs = shape
    values = (random.standard_normal((*lead, outputs, inputs)) * 30).astype(ml_dtypes.float8_e4m3fn)
    scales = random.integers(115, 125, (*lead, outputs, inputs // 32)).astype(np.uint8)
    wide = values.astype(np.float64) * 2.0 ** (np.repeat(scales.astype(np.int64), 32, axis=-1) - 127)
    wide = wide.swapaxes(-1, -2)
    if quantised:
        return mk.Mxfp8.from_rows(jnp.asarray(values), jnp.asarray(scales)), wide
    return jnp.asarray(wide, jnp.bfloat16), wide  # exact: four significant bits


def rows_of(random, *shape):
    return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)


@functools.cache
def jitted(op, **options):
    return jax.jit(functools.partial(getattr(mk, op), impl=INTERPRET, **options))


def test_every_byte_under_every_scale_becomes_the_bfloat16_that_it_stands_for():
    """Exact, but for subnormals, which a CPU may take for zeros; 255 is NaN; a NaN value is the loader's to mark."""
    values = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    matrix = jnp.asarray(np.broadcast_to(values[:, None], (len(values), 32))).view(jnp.float8_e4m3fn)
    dequantize = jax.jit(functools.partial(dequantize_tile, interleaved=32, interpret=True))
    for scale in range(256):
        result = np.asarray(dequantize(matrix, jnp.full((len(values), 1), scale, jnp.uint8)))[:, 0].astype(np.float64)
        factor = np.nan if scale == 255 else 2.0 ** (scale - 127)
        with np.errstate(over="ignore"):
            expected = (values.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * factor).astype(np.float32)
        flushed = np.inf if scale == 0 else np.finfo(np.float32).tiny
        exact = np.isnan(expected) | (np.abs(expected) >= flushed)
        np.testing.assert_array_equal(result[exact], expected.astype(ml_dtypes.bfloat16).astype(np.float64)[exact])
        assert (np.abs(result[~exact]) <= np.abs(expected[~exact])).all()


MATMULS = {(0, 64): 1, (1, 256): 2, (5, 64): 1, (70, 256): 2, (300, 64): 1}  # (rows, inputs): splits


@pytest.mark.parametrize(
    ("rows", "inputs", "quantised"),
    [(*sizes, quantised) for sizes in MATMULS for quantised in (True, False) if quantised or sizes[0] <= FEW_ROWS],
)
def test_matmul_of_several_weights(rows, inputs, quantised):
    """Few rows and many, inputs split and not, rows that fill no tile."""
    assert rows == 0 or matmul_launch(rows, inputs, 16, 208).splits == MATMULS[rows, inputs]
    random = np.random.default_rng(rows)
    x = rows_of(random, rows, inputs)
    weights, wide = zip(*(weight(random, inputs, width, quantised=quantised) for width in (64, 128, 16)), strict=True)
    results = jitted("matmul", dtype=jnp.float32)(x, weights)
    for result, w in zip(results, wide, strict=True):
        expected = np.asarray(x, np.float64) @ w
        np.testing.assert_allclose(result, expected, atol=2e-6 * max(np.abs(expected).max(initial=0), 1))


@pytest.mark.parametrize(("rows", "inputs"), [(0, 64), (5, 64), (1, 256)])
def test_halves_are_joined_as_the_activation_alone_would_join_them(rows, inputs):
    """Bit by bit: where the product ends, and with split inputs in the launch that adds up."""
    assert rows == 0 or (matmul_launch(rows, inputs, 32, 96).splits > 1) == (inputs == 256)
    random = np.random.default_rng(rows)
    x, (w, _) = rows_of(random, rows, inputs) * 0.01, weight(random, inputs, 96)
    expected = ACTIVATION.halves(jitted("matmul")(x, w))
    np.testing.assert_array_equal(jitted("matmul", activation=ACTIVATION)(x, w), expected)
    assert expected.shape == (rows, 48)


@settings(max_examples=3, deadline=None)
@given(rows=st.integers(1, 64), columns=st.sampled_from([8, 24, 320]), splits=st.integers(2, 16))
def test_sums_of_splits_join_halves_bit_by_bit(rows, columns, splits):
    partial = np.random.default_rng(rows).standard_normal((splits, rows, 2 * columns), np.float32)
    (found,) = sum_splits([partial], dtype=jnp.bfloat16, activation=ACTIVATION, interpret=True)
    total = functools.reduce(np.add, partial)  # in order, as the kernel has it
    np.testing.assert_array_equal(found, ACTIVATION.halves(jnp.asarray(total, jnp.bfloat16)))


def test_routed_experts_below_cover_split_inputs_and_joined_halves():
    launches = [group_launch(rows, EXPERTS, HIDDEN, WIDTH, 2 * WIDTH, joined=True) for rows in (1, 90, 300)]
    assert [launch.splits > 1 for launch in launches] == [True, False, False]


def test_very_many_rows_and_narrow_weights_or_arrays_beside_a_wide_one():
    random = np.random.default_rng(4)
    x = rows_of(random, SLAB_ROWS, 64)
    narrow = [weight(random, 64, columns) for columns in (128, 256, 128)]
    mixed = [weight(random, 64, 512), weight(random, 64, 128, quantised=False)]
    for weights in (narrow, mixed):
        results = jitted("matmul", dtype=jnp.float32)(x, tuple(w for w, _ in weights))
        for found, (_, own) in zip(results, weights, strict=True):
            expected = np.asarray(x, np.float64) @ own
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("narrow", "together"), [((128, 64), False), ((128, 256, 128), True)])
def test_very_many_rows_take_wide_weights_by_halves_and_the_others_at_once(narrow, together):
    random = np.random.default_rng(3)
    x = rows_of(random, SLAB_ROWS + 5, 64)
    weights, wide = zip(*(weight(random, 64, columns) for columns in (narrow[0], 768, *narrow[1:])), strict=True)
    assert [takes_slabs([w], len(x)) for w in weights] == [w.shape[1] == 768 for w in weights]
    assert takes_slabs([w for w in weights if w.shape[1] < 768], len(x)) == together
    for found, own in zip(jitted("matmul", dtype=jnp.float32)(x, weights), wide, strict=True):
        expected = np.asarray(x, np.float64) @ own
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_nan_scale_reaches_its_column_only():
    w, _ = weight(np.random.default_rng(0), 64, 32)
    w = mk.Mxfp8(w.values, w.scales.at[5, 1].set(255))
    result = np.asarray(jitted("matmul")(jnp.ones((3, 64), jnp.bfloat16), w), np.float32)
    assert np.isnan(result[:, 5]).all() and np.isfinite(np.delete(result, 5, axis=1)).all()


@pytest.mark.parametrize("quantised", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("rows", [3, 40, 700])
def test_grouped_matmul(rows, quantised):
    @EXAMPLES
    @given(cuts=st.lists(st.integers(0, rows), min_size=EXPERTS, max_size=EXPERTS), seed=st.integers(0, 100))
    @example(cuts=[0] * EXPERTS, seed=0)
    @example(cuts=[0] * (EXPERTS - 1) + [rows], seed=0)
    def check(cuts, seed):
        sizes = np.diff([0, *sorted(cuts)])
        random = np.random.default_rng(seed)
        x = rows_of(random, rows, HIDDEN).at[sizes.sum() :].set(jnp.nan)  # belongs to no group
        w, wide = weight(random, EXPERTS, HIDDEN, WIDTH, quantised=quantised)
        result = jitted("grouped_matmul")(x, w, jnp.asarray(sizes, jnp.int32))
        expected = numpy_ops.grouped_matmul(np.nan_to_num(np.asarray(x, np.float64)), wide, sizes)
        cancelled = 1e-6 * np.abs(expected).max(initial=1)  # of float32 sums whose terms nearly cancel
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=2**-8, atol=cancelled)

    check()


def experts_in_float64(x, ids, weights, gate_up, down):
    total = np.zeros(x.shape)
    for token, choices in enumerate(ids):
        for choice, expert in enumerate(choices):
            if expert < len(gate_up):
                gate, up = np.split(x[token] @ gate_up[expert], 2)
                gate, up = np.minimum(gate, ACTIVATION.limit), np.clip(up, -ACTIVATION.limit, ACTIVATION.limit)
                gated = (up + ACTIVATION.beta) * gate / (1 + np.exp(-ACTIVATION.alpha * gate))
                total[token] += weights[token, choice] * (gated @ down[expert])
    return total


def test_groups_that_count_more_rows_than_there_are_end_with_the_rows():
    w, wide = weight(np.random.default_rng(0), EXPERTS, HIDDEN, WIDTH)
    x = rows_of(np.random.default_rng(1), 4, HIDDEN)
    result = jitted("grouped_matmul")(x, w, jnp.asarray([2, 40, 1, 0, 0], jnp.int32))
    expected = numpy_ops.grouped_matmul(np.asarray(x, np.float64), wide, np.array([2, 2, 0, 0, 0]))
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=2**-8, atol=1e-6)
    assert jitted("grouped_matmul")(x[:0], w, jnp.zeros(EXPERTS, jnp.int32)).shape == (0, WIDTH)


@pytest.mark.parametrize("quantised", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("tokens", [1, 30, 200])
def test_routed_experts(tokens, quantised):
    """Experts here and elsewhere, some without tokens; poisoned where nothing may be read."""

    @EXAMPLES
    @given(
        here=st.sampled_from([0.0, 0.5, 1.0]),
        only=st.sampled_from([None, 2]),
        first=st.sampled_from([0, 5]),
        seed=st.integers(0, 100),
    )
    def check(here, only, first, seed):
        random = np.random.default_rng(seed)
        x = rows_of(random, tokens, HIDDEN) * 0.05
        (gate_up, wide_gate_up), (down, wide_down) = (
            weight(random, *shape, quantised=quantised)
            for shape in ((EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN))
        )
        ids = np.stack([random.permutation(EXPERTS)[:PER_TOKEN] for _ in range(tokens)]).astype(np.int32)
        if only is not None:
            ids = np.where(ids == only, ids, EXPERTS + 3)
        ids = np.where(random.random(ids.shape) < here, ids, EXPERTS + 1).astype(np.int32)
        unused = np.setdiff1d(np.arange(EXPERTS), ids)
        if quantised:
            gate_up = mk.Mxfp8(gate_up.values, gate_up.scales.at[unused].set(255))
            down = mk.Mxfp8(down.values, down.scales.at[unused].set(255))
        else:
            gate_up, down = gate_up.at[unused].set(jnp.nan), down.at[unused].set(jnp.nan)
        weights = random.random(ids.shape).astype(np.float32)
        run = jitted("routed_experts", activation=ACTIVATION, num_experts=2 * EXPERTS)
        result = np.asarray(run(x, ids + first, weights, gate_up, down, None, first), np.float64)
        if quantised and tokens < 200:
            addend = rows_of(random, tokens, HIDDEN) * jnp.bfloat16(result.std())
            together = run(x, ids + first, weights, gate_up, down, addend, first)
            np.testing.assert_array_equal(together, jnp.asarray(result, jnp.bfloat16) + addend)
        expected = experts_in_float64(np.asarray(x, np.float64), ids, weights, wide_gate_up, wide_down)
        np.testing.assert_allclose(result, expected, atol=0.02 * max(np.abs(expected).max(), 1e-3))

    check()


def test_derivatives_of_an_opaque_kernel_are_the_references():
    """Training on a GPU: what `impl=None` picks there has no derivative of its own."""
    random = np.random.default_rng(0)
    x, weights = rows_of(random, 4, HIDDEN), jnp.ones((4, 2), jnp.float32)
    ids = jnp.asarray([[0, 1], [1, 2], [7, 2], [4, 3]], jnp.int32)
    gate_up, _ = weight(random, EXPERTS, HIDDEN, 2 * WIDTH, quantised=False)
    down, _ = weight(random, EXPERTS, WIDTH, HIDDEN, quantised=False)

    def opaque(x, *_, **__):
        return jax.pure_callback(np.zeros_like, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    options = {"activation": ACTIVATION, "num_experts": None}
    call = _with_gradient_of(reference.routed_experts, opaque, options)

    def loss(function, x, down, **options):
        return function(x, ids, weights, gate_up, down, **options).astype(jnp.float32).sum()

    assert not np.asarray(call(x, ids, weights, gate_up, down)).any()
    found = jax.jit(jax.grad(functools.partial(loss, call), argnums=(0, 1)))(x, down)
    expected = jax.jit(jax.grad(functools.partial(loss, reference.routed_experts, **options), argnums=(0, 1)))(x, down)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_the_kernels_do_not_serve():
    w, _ = weight(np.random.default_rng(0), 64, 32)
    x = jnp.ones((3, 64), jnp.bfloat16)
    run = functools.partial(mk.matmul, impl=INTERPRET)
    with pytest.raises(NotImplementedError, match="rows are float32, not bfloat16"):
        run(x.astype(jnp.float32), w)
    array = jnp.ones((64, 32), jnp.bfloat16)
    for rows, weights in ((x, array), (jnp.ones((65, 64), jnp.bfloat16), (array, array))):
        with pytest.raises(NotImplementedError, match="which XLA multiplies best"):
            run(rows, weights)
    with pytest.raises(NotImplementedError, match="N = 8 of the weight is not a multiple of 16"):
        run(x, mk.Mxfp8(w.values[:8], w.scales[:8]))
    big = mk.Mxfp8(
        jax.ShapeDtypeStruct((64, 6144, 6144), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((64, 6144, 192), jnp.uint8)
    )
    with pytest.raises(NotImplementedError, match="between 2 and 4 GiB"):
        jax.eval_shape(
            functools.partial(mk.grouped_matmul, impl="pallas_triton"),
            jax.ShapeDtypeStruct((8, 6144), jnp.bfloat16), big, jax.ShapeDtypeStruct((64,), jnp.int32),
        )  # fmt: skip
