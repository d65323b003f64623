"""The Pallas kernels in Pallas's interpreter, against NumPy on ragged batches whose foreign memory is NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_ops
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_ops import Shape, samples
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
from minimax_kernels.launch_table import MOST_RANKED_BLOCKS, PageLaunch
from minimax_kernels.select_blocks import pallas_triton as select_blocks
from minimax_kernels.select_blocks.maxima import HELD_BY_PROGRAM
from minimax_kernels.sparse_attention.by_page import sort_pairs
from minimax_kernels.sparse_attention.pallas_triton import sparse_attention
from minimax_kernels.triton_call import Launch

IMPL = "pallas_triton_interpret"
EXAMPLES = settings(max_examples=4)  # the interpreter is slow, and so is compiling what it makes

# Triton's blocks have sizes that are powers of two, from 16 on.
SHAPES = {
    "mixed": Shape(T=40, R=4, N=5, B=16, Hq=4, Hkv=2, Hi=2, topk=2, D=16),
    "prefill of one": Shape(T=70, R=1, N=6, B=16, Hq=8, Hkv=1, Hi=1, topk=3, D=32, local=2),
    "decode": Shape(T=5, R=5, N=7, B=16, Hq=8, Hkv=4, Hi=4, topk=3, D=16, init=1),
    "verify": Shape(T=24, R=3, N=5, B=16, Hq=8, Hkv=2, Hi=1, topk=3, D=16),
    "two index heads a kv head": Shape(T=40, R=2, N=5, B=16, Hq=8, Hkv=2, Hi=4, topk=4, D=16, init=1, local=2),
    "more topk than blocks, no local": Shape(T=24, R=2, N=3, B=32, Hq=2, Hkv=2, Hi=2, topk=7, D=16, local=0),
}
each_shape = pytest.mark.parametrize("name", SHAPES)


@each_shape
@EXAMPLES
@given(data=st.data())
def test_index_score(name, data):
    check_index_score(data.draw(samples(SHAPES[name])), IMPL)


@each_shape
@EXAMPLES
@given(data=st.data())
def test_select_blocks_with_ties(name, data):
    check_select_blocks(data.draw(samples(SHAPES[name])), data.draw(st.integers(0, 1000)), IMPL)


@each_shape
@EXAMPLES
@given(data=st.data())
def test_dense_attention(name, data):
    check_dense_attention(data.draw(samples(SHAPES[name])), IMPL)


@each_shape
@EXAMPLES
@given(data=st.data())
def test_sparse_attention_of_any_selection(name, data):
    check_sparse_attention(data.draw(samples(SHAPES[name])), data.draw(st.integers(0, 1000)), IMPL)


PAGE_OPTIONS = {
    "one chunk": PageLaunch(rows=16, pairs_per_program=16, workspace_bytes=1 << 30, launch=Launch(), window=8),
    "chunks of a few tokens": PageLaunch(
        rows=32, pairs_per_program=8, workspace_bytes=1 << 13, launch=Launch(), window=2048
    ),
}


@functools.cache
def by_page(name: str):
    return jax.jit(
        functools.partial(sparse_attention, scale=SCALE, interpret=True, by_page=True, page_options=PAGE_OPTIONS[name])
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [("mixed", "chunks of a few tokens"), ("prefill of one", "one chunk"), ("two index heads a kv head", "one chunk")],
)
@settings(max_examples=3)
@given(data=st.data())
def test_sparse_attention_page_by_page(name, options, data):
    """The kernel of long prefills, which small batches would not reach: runs that cross programs, windows, chunks."""
    check_sparse_attention(data.draw(samples(SHAPES[name])), data.draw(st.integers(0, 1000)), run=by_page(options))


def test_partial_results_page_by_page_fit_float16():
    """A sum over a page of equal keys is 16 times its values: beyond float16 where it is stored before the division."""
    s = fixed_sample(SHAPES["prefill of one"])
    q, keys = (jnp.zeros_like(x, jnp.float16) for x in (s.q, s.k_cache))
    values = jnp.full_like(keys, 30_000.0)
    selected = jnp.where(jnp.asarray(s.live)[None, :, None], 0, -1) * jnp.ones((1, 1, 3), jnp.int32)
    selected = selected.at[..., 1:].set(-1)
    result = by_page("one chunk")(q, keys, values, selected, s.batch, out=None)
    np.testing.assert_array_equal(result[s.live], jnp.full_like(q, 30_000.0)[s.live])


@pytest.mark.parametrize(("blocks", "dtype"), [(65535, np.uint16), (65536, np.int32)])
def test_pairs_of_pages_are_sorted_by_as_few_bits_as_suffice(blocks, dtype):
    random = np.random.default_rng(0)
    selected = random.integers(-1, blocks, (1, 9, 5)).astype(np.int32)
    selected[0, :, 0], live = blocks - 1, np.arange(9) != 4
    keys, pairs = sort_pairs(
        jnp.asarray(selected), jnp.zeros(9, jnp.int32), jnp.asarray(live), num_requests=1, num_blocks=blocks, window=16
    )
    expected = np.where((selected >= 0) & live[None, :, None], selected, np.iinfo(dtype).max).reshape(-1)
    order = np.argsort(expected, kind="stable")
    assert keys.dtype == dtype
    np.testing.assert_array_equal(keys, expected[order])
    np.testing.assert_array_equal(pairs, order)


def test_dense_attention_of_head_counts_that_are_no_power_of_two():
    """Tiles of 21 rows once were cut as if they were of 16, and the last requests were never reached."""
    requests, length, heads = 8, 64, 6
    random = np.random.default_rng(3)
    q = random.standard_normal((requests * length, heads, 16)).astype(np.float32)
    caches = random.standard_normal((2, requests * 4, 1, 16, 16)).astype(np.float32)
    tables = jnp.asarray(random.permutation(requests * 4).reshape(requests, 4), jnp.int32)
    starts = jnp.arange(requests + 1, dtype=jnp.int32) * length
    batch = mk.Batch(tables, starts, jnp.full((requests,), length, jnp.int32))
    got, expected = (
        jitted("dense_attention", scale=SCALE, impl=impl)(q, *caches, batch) for impl in (IMPL, "reference")
    )
    np.testing.assert_allclose(got, expected, atol=2e-5)


@settings(max_examples=2)
@given(s=samples(Shape(T=3, R=3, N=130, B=16, Hq=4, Hkv=2, Hi=1, topk=3, D=16)))
def test_msa_of_many_blocks(s):
    """More blocks than the attention kernel ranks by itself: selection is a launch of its own."""
    assert s.shape.N > MOST_RANKED_BLOCKS
    check_msa(s, IMPL)


@each_shape
@EXAMPLES
@given(data=st.data(), ties=st.booleans())
def test_msa(name, data, ties):
    check_msa(data.draw(samples(SHAPES[name], ties=ties)), IMPL)


@pytest.mark.parametrize(("dtype", "fp8"), [("bfloat16", False), ("float16", False), ("bfloat16", True)])
@settings(max_examples=2)
@given(s=samples(SHAPES["mixed"]))
def test_narrow_types(s, dtype, fp8):
    """Operands of 16 bits, or caches of 8: scores and sums in float32, probabilities rounded."""
    caches = ("k_cache", "v_cache", "index_cache")
    types = {"q": dtype, "idx_q": dtype} | dict.fromkeys(caches, "float8_e4m3fn" if fp8 else dtype)
    narrow = {name: jnp.asarray(getattr(s, name), kind) for name, kind in types.items()}
    if fp8:  # beyond float16, which products with e4m3 are made in
        narrow["idx_q"] *= jnp.exp2(40.0 * (jnp.arange(s.shape.T) % 3 - 1)).astype(dtype)[:, None, None]
    rounded = numpy_ops.Sample(**{**vars(s), **{name: np.asarray(x, np.float32) for name, x in narrow.items()}})
    scores = jitted("index_score", impl=IMPL)(narrow["idx_q"], narrow["index_cache"], s.batch)
    np.testing.assert_allclose(scores, numpy_ops.index_score(rounded), atol=1e-4, rtol=1e-6)
    attend = jitted("dense_attention", scale=SCALE, impl=IMPL)
    result = attend(narrow["q"], narrow["k_cache"], narrow["v_cache"], s.batch)
    assert result.dtype == dtype
    expected = numpy_ops.attention(rounded, SCALE)
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=2e-2)


@pytest.mark.parametrize("name", ["mixed", "decode"])
@settings(max_examples=3)
@given(data=st.data())
def test_fp8_caches(name, data):
    """Keys and values of 8 bits, NaN where nobody owns them: exactly the attention over the rounded numbers."""
    s = with_fp8_caches(data.draw(samples(SHAPES[name])))
    if name == "decode":
        check_msa(s, IMPL)
    else:
        check_sparse_attention(s, 5, run=by_page("one chunk"))


def test_repeats_are_equal_bit_for_bit():
    s = fixed_sample(SHAPES["prefill of one"])
    run = jitted("msa", scale=SCALE, impl=IMPL, **options_of(s.shape))
    args = (s.q, s.k_cache, s.v_cache, s.idx_q, s.index_cache, s.batch)
    np.testing.assert_array_equal(*(np.asarray(run(*args)).view(np.uint32) for _ in range(2)))


@pytest.mark.parametrize("width", [1, 2, 17, 300, 2 * HELD_BY_PROGRAM + 50])
@pytest.mark.parametrize("kind", ["without order", "ties", "NaN and inf", "rising"])
def test_selection_of_many_blocks(width, kind):
    """One chunk and several; NaN ranks highest, of equal scores the lower block wins; many ties fill no cells."""
    random = np.random.default_rng(width)
    rows, topk = 6, 16 if kind == "without order" else 5
    scores = {
        "without order": random.standard_normal((2, rows, width)),
        "ties": random.integers(-2, 3, (2, rows, width)),
        "NaN and inf": random.choice([np.nan, np.inf, 1.0, 2.0], (2, rows, width)),
        "rising": np.broadcast_to(np.arange(width), (2, rows, width)),
    }[kind].astype(np.float32)
    own = random.integers(0, width, rows)
    own[-1] = width - 1
    scores = np.where(np.arange(width) <= own[:, None], scores, np.float32(-np.inf))
    batch = mk.Batch(jnp.zeros((rows, width), jnp.int32), jnp.arange(rows + 1), jnp.asarray((own + 1) * 16))
    options = {"topk": topk, "init_blocks": 1, "local_blocks": 1}
    selected, expected = (
        np.asarray(jitted("select_blocks", impl=impl, **options)(scores, batch)) for impl in (IMPL, "reference")
    )
    np.testing.assert_array_equal(np.sort(selected), np.sort(expected))
    np.testing.assert_array_equal(selected >= 0, expected >= 0)  # valid ids first


@pytest.mark.parametrize(("topk", "init", "local"), [(1, 0, 1), (1, 1, 0), (2, 1, 1), (16, 1, 2)])
def test_selection_where_forced_blocks_are_nan(topk, init, local):
    """A forced block counts as one whatever its score; with topk 1 a NaN there once hid all that there was."""
    random = np.random.default_rng(topk)
    scores = random.standard_normal((1, 5, 40)).astype(np.float32)
    for row, blocks in enumerate([[39], [0], [0, 39], [5, 20, 39]]):
        scores[0, row, blocks] = np.nan
    scores[0, 4, [0, 39, 7]] = np.nan, np.nan, np.inf
    assert_selection_of_reference(scores, topk, init, local)


@pytest.mark.parametrize(("width", "warps"), [(40, 1), (2 * HELD_BY_PROGRAM + 50, 1), (2 * HELD_BY_PROGRAM + 50, 4)])
@pytest.mark.parametrize("kind", ["without order", "ties"])
def test_selection_beyond_scores_of_minus_infinity(width, warps, kind, monkeypatch):
    """Such a block is not visible, and those behind it are: in three chunks of one warp, in one of four."""
    monkeypatch.setattr(select_blocks, "select_launch", lambda *_: Launch(warps, 1))
    random = np.random.default_rng(width)
    scores = random.standard_normal((1, 4, width)) if kind == "without order" else random.integers(-2, 3, (1, 4, width))
    scores = scores.astype(np.float32)
    scores[0, 0, : width - 9] = scores[0, 1, 5:-3] = scores[0, 2, 1::2] = scores[0, 3, : width * 2 // 3] = -np.inf
    assert_selection_of_reference(scores, 5, 1, 1)


def assert_selection_of_reference(scores, topk: int, init: int, local: int) -> None:
    """Each row is a request of its own, as long as there are scores."""
    rows, width = scores.shape[1:]
    batch = mk.Batch(jnp.zeros((rows, width), jnp.int32), jnp.arange(rows + 1), jnp.full((rows,), width * 16))
    options = {"topk": topk, "init_blocks": init, "local_blocks": local}
    # not through `jitted`, which would hold on to launches that a test sets
    selected = jax.jit(functools.partial(select_blocks.select_blocks, interpret=True, **options))(scores, batch)
    expected = jitted("select_blocks", impl="reference", **options)(scores, batch)
    np.testing.assert_array_equal(np.sort(selected), np.sort(expected))


# ---- writes

WRITES = {"one head": (9, 4, 1, 16, 16), "heads": (21, 5, 2, 16, 32), "one token": (1, 2, 4, 32, 16)}


@pytest.mark.parametrize("name", WRITES)
@settings(max_examples=6)
@given(data=st.data(), cache_dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]))
def test_writes_touch_their_slots_alone(name, data, cache_dtype):
    """Unique slots or -1; NaN rows of skipped tokens go nowhere; in place when donated."""
    tokens, pages, heads, block, dim = WRITES[name]
    every = data.draw(st.permutations(range(pages * block)))[:tokens]
    skip = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    slots = np.where(skip, -1, every)
    random = np.random.default_rng(0)
    new = random.standard_normal((3, tokens, heads, dim)).astype(np.float32)
    new[:, slots < 0] = np.nan
    k, v, idx_k = new[0], new[1], new[2, :, :1]
    shapes = [(pages, heads, block, dim)] * 2 + [(pages, block, dim)]
    before = [np.asarray(jnp.asarray(random.standard_normal(shape), cache_dtype)) for shape in shapes]
    expected = [x.copy() for x in before]
    for token, slot in enumerate(slots):
        if slot >= 0:
            page, offset = divmod(int(slot), block)
            for cache, row in zip(expected, (k[token], v[token], idx_k[token, 0]), strict=True):
                cache[(page, slice(None), offset) if cache.ndim == 4 else (page, offset)] = row.astype(cache.dtype)
    slots = jnp.asarray(slots, jnp.int32)
    donated = [jnp.asarray(x) for x in before]
    pointers = [x.unsafe_buffer_pointer() for x in donated]
    results = [
        *donating("write_kv", 2)(*donated[:2], k, v, slots),
        donating("write_index", 1)(donated[2], idx_k, slots),
    ]
    together = [jnp.asarray(x) for x in before]  # all three in one launch
    pointers += [x.unsafe_buffer_pointer() for x in together]
    results += donating("write_kv_index", 3)(*together, k, v, idx_k, slots)
    for result, wanted in zip(results, 2 * expected, strict=True):
        assert result.dtype == cache_dtype
        np.testing.assert_array_equal(result, wanted)
    assert [x.unsafe_buffer_pointer() for x in results] == pointers


@functools.cache
def donating(op: str, caches: int):
    return jax.jit(functools.partial(getattr(mk, op), impl=IMPL), donate_argnums=tuple(range(caches)))
