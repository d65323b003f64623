"""Every attention operation against NumPy on ragged batches whose foreign memory is NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy_ops
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_ops import SHAPES, Shape, samples
from op_checks import (
    SCALE,
    check_dense_attention,
    check_index_score,
    check_msa,
    check_select_blocks,
    check_sparse_attention,
    fixed_sample,
    jitted,
    options_of,
    with_fp8_caches,
)

import minimax_kernels as mk

EXAMPLES = settings(max_examples=12)
each_shape = pytest.mark.parametrize("name", SHAPES)


@each_shape
@EXAMPLES
@given(data=st.data())
def test_index_score(name, data):
    check_index_score(data.draw(samples(SHAPES[name])))


@each_shape
@EXAMPLES
@given(data=st.data())
def test_select_blocks_with_ties(name, data):
    check_select_blocks(data.draw(samples(SHAPES[name])), data.draw(st.integers(0, 1000)))


@each_shape
@EXAMPLES
@given(data=st.data())
def test_dense_attention(name, data):
    check_dense_attention(data.draw(samples(SHAPES[name])))


@each_shape
@EXAMPLES
@given(data=st.data())
def test_sparse_attention_of_any_selection(name, data):
    check_sparse_attention(data.draw(samples(SHAPES[name])), data.draw(st.integers(0, 1000)))


@each_shape
@EXAMPLES
@given(data=st.data(), ties=st.booleans())
def test_msa(name, data, ties):
    """Index keys of -1, 0 and 1 give exact ties (their dot products have no rounding)."""
    check_msa(data.draw(samples(SHAPES[name], ties=ties)))


@EXAMPLES
@given(s=samples(SHAPES["decode"]))
def test_decode_takes_the_gather_path_and_agrees_with_the_tile_path(s):
    """One query a request reads its own blocks; more rows of padding force the tiles that read all blocks."""
    from minimax_kernels.batch import tile_size

    shape = s.shape
    assert tile_size(shape.T, shape.R) == 1 and tile_size(4 * shape.T, shape.R) == 4
    chosen = numpy_ops.select_blocks(s, numpy_ops.index_score(s))
    selected = numpy_ops.as_selection(chosen, shape.topk, np.random.default_rng(0))
    run = jitted("sparse_attention", scale=SCALE)
    gathered = run(s.q, s.k_cache, s.v_cache, selected, s.batch)
    padded_q = np.concatenate([s.q, np.full((3 * shape.T, *s.q.shape[1:]), np.nan, s.q.dtype)])
    padded = np.pad(selected, ((0, 0), (0, 3 * shape.T), (0, 0)), constant_values=-1)
    tiled = np.asarray(run(padded_q, s.k_cache, s.v_cache, padded, s.batch))
    np.testing.assert_allclose(tiled[: shape.T], gathered, atol=1e-6)
    assert not tiled[shape.T :].any()


@EXAMPLES
@given(s=samples(SHAPES["mixed"]))
def test_bfloat16(s):
    """Operands of bfloat16: accumulated in float32, rounded once."""
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (s.q, s.k_cache, s.v_cache)]
    q, k, v = (np.asarray(x, np.float32) for x in narrow)
    rounded = numpy_ops.Sample(**{**vars(s), "q": q, "k_cache": k, "v_cache": v})
    expected = numpy_ops.attention(rounded, SCALE)
    result = jitted("dense_attention", scale=SCALE)(*narrow, s.batch)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=1e-5, rtol=2.0**-8)
    wide = jitted("dense_attention", scale=SCALE)(*narrow, s.batch, out=jnp.zeros(q.shape, jnp.float32))
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_caches(dtype):
    """Caches of e4m3 give what their numbers give in the queries' own type: reading them rounds nothing."""
    s = with_fp8_caches(fixed_sample(SHAPES["one request"]))
    q, idx_q = (jnp.asarray(x, dtype) for x in (s.q, s.idx_q))
    caches = [jnp.asarray(x) for x in (s.k_cache, s.v_cache, s.index_cache)]
    wide = [x.astype(dtype) for x in caches]
    run = jitted("msa", scale=SCALE, impl="reference", **options_of(s.shape))
    results = [np.asarray(run(q, k, v, idx_q, index, s.batch), np.float32) for k, v, index in (caches, wide)]
    np.testing.assert_array_equal(*results)
    if dtype == "float32":
        check_msa(s)
        check_dense_attention(s)


def test_forced_blocks_count_inside_topk():
    """Five blocks, top 3 with one initial and one local: one is left to choose by score."""
    shape = Shape(T=1, R=1, N=6, B=16, Hq=1, Hkv=1, Hi=1, topk=3)
    batch = mk.Batch(jnp.zeros((1, 6), jnp.int32), jnp.array([0, 1]), jnp.array([70]))
    scores = jnp.array([[[-9.0, 1.0, 3.0, 3.0, -9.0, -jnp.inf]]])
    for init, local, expected in (
        (0, 1, {4, 2, 3}),
        (1, 1, {0, 4, 2}),
        (2, 1, {0, 1, 4}),
        (0, 0, {1, 2, 3}),
        (0, 3, {2, 3, 4}),
    ):
        selected = mk.select_blocks(scores, batch, topk=shape.topk, init_blocks=init, local_blocks=local)
        assert set(selected[0, 0].tolist()) == expected, (init, local)


def test_a_constant_batch_inside_a_trace():
    """The check of the lengths looks at values that are at hand; in a trace it must not compute with them."""
    batch = mk.Batch(jnp.zeros((1, 1), jnp.int32), jnp.array([0, 2]), jnp.array([2]))
    cache = jnp.ones((1, 1, 16, 8))
    result = jax.jit(lambda q: mk.dense_attention(q, cache, cache, batch, scale=1.0))(jnp.ones((2, 1, 8)))
    np.testing.assert_allclose(result, 1.0)
    too_long = mk.Batch(batch.block_tables, batch.query_starts, jnp.array([17]))
    with pytest.raises(ValueError, match=r"batch\.kv_lens has 17 tokens"):
        jax.jit(lambda q: mk.dense_attention(q, cache, cache, too_long, scale=1.0))(jnp.ones((2, 1, 8)))


def test_selection_of_few_visible_blocks():
    batch = mk.Batch(jnp.zeros((2, 3), jnp.int32), jnp.array([0, 1, 2]), jnp.array([1, 33]))
    scores = jnp.array([[[1.0, -jnp.inf, -jnp.inf], [5.0, 7.0, 6.0], [1.0, 1.0, 1.0]]])
    selected = np.asarray(mk.select_blocks(scores, batch, topk=5, init_blocks=1, local_blocks=2))
    assert [sorted(row) for row in selected[0].tolist()] == [[-1, -1, -1, -1, 0], [-1, -1, 0, 1, 2], [-1] * 5]
    assert (selected[0, 0, 1:] == -1).all() and (selected[0, 1, 3:] == -1).all()


def test_differentiable_in_q_k_and_v():
    """Against central differences in one random direction."""
    shape = SHAPES["mixed"]
    random = np.random.default_rng(0)
    batch, slots, pages = mk.packed_batch(jnp.array([0, 3, 3, 35, 36]), shape.T, shape.B, shape.T)
    q, k, v = (jnp.asarray(random.standard_normal((shape.T, h, shape.D)), jnp.float32) for h in (4, 2, 2))
    idx_q = jnp.asarray(random.standard_normal((shape.T, 2, shape.D)), jnp.float32)
    index = mk.write_index(jnp.zeros((pages, shape.B, shape.D)), idx_q[:, 0], slots)
    weights = jnp.asarray(random.standard_normal(q.shape), jnp.float32)

    @jax.jit
    def loss(args):
        q, k, v, idx_q = args
        empty = jnp.zeros((pages, shape.Hkv, shape.B, shape.D))
        caches = mk.write_kv(empty, empty, k, v, slots)
        return (mk.msa(q, *caches, idx_q, index, batch, scale=SCALE, topk=2) * weights).sum()

    args = (q, k, v, idx_q)
    gradients = jax.grad(loss)(args)
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)
    assert not np.asarray(gradients[3]).any()
    for i in range(3):
        direction = jnp.asarray(random.standard_normal(args[i].shape), jnp.float32)
        step = [loss((*args[:i], args[i] + e * direction, *args[i + 1 :])) for e in (1e-2, -1e-2)]
        slope = float(step[0] - step[1]) / 2e-2
        assert float((gradients[i] * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-2)
