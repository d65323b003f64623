"""Cache writes, packing and grouped products against NumPy."""

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
from minimax_kernels.batch import query_tiles, tile_size
from minimax_kernels.grouped_matmul import reference as grouped_reference
from minimax_kernels.mxfp8 import dequantize, interleave, interleaved_inputs, straighten

EXAMPLES = settings(max_examples=30)
T, PAGES, HEADS, BLOCK, DIM = 9, 4, 2, 16, 8


@functools.cache
def jitted(op, **options):
    return jax.jit(functools.partial(getattr(mk, op), **options))


# ---- write_kv, write_index

slots_strategy = st.lists(st.integers(0, PAGES * BLOCK - 1), min_size=T, max_size=T, unique=True).flatmap(
    lambda slots: st.lists(st.booleans(), min_size=T, max_size=T).map(
        lambda skip: [-1 if s else slot for s, slot in zip(skip, slots, strict=True)]
    )
)


@EXAMPLES
@given(slots=slots_strategy, cache_dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]))
@example(slots=[-1] * T, cache_dtype="float32")
@example(slots=[0, 15, 16, 63, -1, -1, 48, 47, 31], cache_dtype="float32")
def test_writes_touch_their_slots_alone(slots, cache_dtype):
    random = np.random.default_rng(0)
    k, v = random.standard_normal((2, T, HEADS, DIM)).astype(np.float32)
    idx_k = random.standard_normal((T, 1, DIM)).astype(np.float32)
    before_k, before_v = (jnp.asarray(random.standard_normal((PAGES, HEADS, BLOCK, DIM)), cache_dtype) for _ in "kv")
    before_index = jnp.asarray(random.standard_normal((PAGES, BLOCK, DIM)), cache_dtype)
    expected = [np.array(x) for x in (before_k, before_v, before_index)]
    for token, slot in enumerate(slots):
        if slot >= 0:
            page, offset = divmod(slot, BLOCK)
            expected[0][page, :, offset] = np.asarray(jnp.asarray(k[token], cache_dtype))
            expected[1][page, :, offset] = np.asarray(jnp.asarray(v[token], cache_dtype))
            expected[2][page, offset] = np.asarray(jnp.asarray(idx_k[token, 0], cache_dtype))
    slots = jnp.asarray(slots, jnp.int32)
    results = [*jitted("write_kv")(before_k, before_v, k, v, slots), jitted("write_index")(before_index, idx_k, slots)]
    results.append(jitted("write_index")(before_index, idx_k[:, 0], slots))  # [T, D] is taken too
    results += jitted("write_kv_index")(before_k, before_v, before_index, k, v, idx_k, slots)
    for result, wanted in zip(results, [*expected, expected[2], *expected], strict=True):
        assert result.dtype == cache_dtype
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("impl", ["reference", "pallas_triton_interpret"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_e4m3_rows_saturate_and_keep_nan(impl, dtype):
    """A cast alone makes NaN of what is beyond 448 (464 and more); ties go to the even neighbour, tiny numbers to 0."""
    wanted = {  # 2 ** -9 is the least number of e4m3
        448: 448, 463: 448, 464: 448, 1e6: 448, np.inf: 448, -np.inf: -448, -1e30: -448, np.nan: np.nan,
        1.0625: 1.0, 1.1875: 1.25, -0.0: -0.0, 2**-9: 2**-9, 2**-10: 0, 3 * 2**-10: 2**-8, -(2**-6): -(2**-6), 7: 7,
    }  # fmt: skip
    rows = jnp.asarray([list(wanted)], dtype)[None]
    k, v = (jnp.zeros((1, 1, 16, 16), "float8_e4m3fn") for _ in "kv")
    k, _ = jitted("write_kv", impl=impl)(k, v, rows, rows, jnp.asarray([3]))
    np.testing.assert_array_equal(np.asarray(k[0, 0, 3], np.float32), np.float32(list(wanted.values())))


# ---- packed_batch, query_tiles


@EXAMPLES
@given(
    lens=st.lists(st.sampled_from([0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]), min_size=3, max_size=3).filter(
        lambda lens: sum(lens) <= 80
    )
)
def test_packed_batch_gives_each_token_a_slot_of_its_own(lens):
    starts = np.concatenate([[0], np.cumsum(lens)])
    batch, slots, num_pages = mk.packed_batch(jnp.asarray(starts), 80, BLOCK, 2 * BLOCK)
    slots = np.asarray(slots)
    assert batch.block_tables.shape == (3, 2)
    assert {a.dtype for a in (batch.block_tables, batch.query_starts, batch.kv_lens)} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(batch.kv_lens, lens)
    assert (slots[starts[-1] :] == -1).all()
    live = slots[: starts[-1]]
    assert len(set(live.tolist())) == len(live)
    assert all(slot in range(num_pages * BLOCK) for slot in live)
    for request, length in enumerate(lens):
        for position in range(length):
            page = batch.block_tables[request, position // BLOCK]
            assert live[starts[request] + position] == page * BLOCK + position % BLOCK


@EXAMPLES
@given(
    lens=st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(lambda lens: sum(lens) <= 30),
    past=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    tile=st.sampled_from([1, 4, 8]),
)
def test_query_tiles_hold_every_live_row_once(lens, past, tile):
    starts = np.concatenate([[0], np.cumsum(lens)])
    kv_lens = np.array(lens) + past
    batch = mk.Batch(jnp.zeros((4, 5), jnp.int32), jnp.asarray(starts), jnp.asarray(kv_lens))
    tiles = query_tiles(batch, 30, tile)
    found = {}
    for request, rows, positions in zip(*map(np.asarray, tiles), strict=True):
        for row, position in zip(rows, positions, strict=True):
            assert (row == 30) == (position == -1)
            if row < 30:
                assert row not in found
                found[int(row)] = (int(request), int(position))
    expected = {int(starts[r]) + i: (r, past[r] + i) for r in range(4) for i in range(lens[r])}
    assert found == expected


def test_tile_size_follows_the_mean_query_length():
    assert [tile_size(*sizes) for sizes in ((8, 8), (9, 8), (64, 8), (4096, 2), (5, 0))] == [1, 2, 8, 64, 8]


# ---- grouped_matmul

GROUP_SHAPES = {"small tiles": (24, 64, 10, 6), "one group": (24, 32, 8, 1), "big tiles": (96, 32, 8, 3)}


@st.composite
def groups(draw, rows, count):
    kind = draw(st.sampled_from(["any", "one", "none", "full"]))
    if kind == "none":
        return [0] * count
    if kind == "one":
        sizes = [0] * count
        sizes[draw(st.integers(0, count - 1))] = rows
        return sizes
    ends = sorted(draw(st.lists(st.integers(0, rows), min_size=count, max_size=count)))
    if kind == "full":
        ends[-1] = rows
    return np.diff([0, *ends]).tolist()


def mxfp8(random, experts, rows, columns):
    values = (random.standard_normal((experts, columns, rows)) * 30).astype(ml_dtypes.float8_e4m3fn)
    scales = random.integers(115, 125, (experts, columns, rows // 32)).astype(np.uint8)
    wide = values.astype(np.float64) * 2.0 ** (np.repeat(scales.astype(np.int64), 32, axis=2) - 127)
    return mk.Mxfp8.from_rows(jnp.asarray(values), jnp.asarray(scales)), wide.swapaxes(1, 2)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", GROUP_SHAPES)
def test_grouped_matmul(name, batched, quantised, monkeypatch):
    """Both ways of the reference: all tiles as one product, and tile after tile."""
    rows, inputs, outputs, experts = GROUP_SHAPES[name]
    if not batched:
        monkeypatch.setattr(grouped_reference, "_BATCHED_WEIGHT_LIMIT", 0)
    run = jax.jit(lambda x, w, sizes: mk.grouped_matmul(x, w, sizes))  # traced anew, with the limit above

    @EXAMPLES
    @given(sizes=groups(rows, experts), seed=st.integers(0, 100))
    @example(sizes=[0] * experts, seed=0)
    @example(sizes=[0] * (experts - 1) + [rows], seed=0)
    def check(sizes, seed):
        random = np.random.default_rng(seed)
        x = random.standard_normal((rows, inputs)).astype(np.float32)
        x[sum(sizes) :] = np.nan  # belongs to no group
        if quantised:
            w, wide = mxfp8(random, experts, inputs, outputs)
        else:
            w = wide = random.standard_normal((experts, inputs, outputs)).astype(np.float32)
        result = run(x, w, jnp.asarray(sizes, jnp.int32))
        assert result.dtype == jnp.float32
        expected = numpy_ops.grouped_matmul(np.nan_to_num(x), wide, np.array(sizes))
        np.testing.assert_allclose(result, expected, atol=1e-6 * max(np.abs(expected).max(), 1))

    check()


def test_grouped_matmul_does_not_read_matrices_of_empty_groups():
    w = np.ones((3, 32, 4), np.float32)
    w[1] = np.nan
    result = mk.grouped_matmul(jnp.ones((5, 32)), jnp.asarray(w), jnp.array([2, 0, 3]))
    np.testing.assert_array_equal(result, np.full((5, 4), 32.0))


def test_grouped_matmul_in_bfloat16_accumulates_in_float32():
    """Sums of 1 and many 2^-9: in bfloat16 the small ones would all be lost."""
    x = jnp.ones((4, 512), jnp.bfloat16)
    w = jnp.full((1, 512, 2), 2.0**-9, jnp.bfloat16).at[:, 0].set(1.0)
    result = mk.grouped_matmul(x, w, jnp.array([4]))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(result, np.float32), 2.0)


def test_mxfp8_dequantisation_of_every_byte():
    """All 256 values under all 256 scales, exact; 255 is NaN."""
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    matrix = np.broadcast_to(values[:, None], (256, 32))
    with np.errstate(over="ignore"):
        for scale in [*range(256)]:
            scales = np.full((256, 1), scale, np.uint8)
            result = dequantize(mk.Mxfp8(jnp.asarray(matrix), jnp.asarray(scales)))
            factor = np.nan if scale == 255 else 2.0 ** (scale - 127)
            expected = (values.astype(np.float64) * factor).astype(np.float32)
            # XLA may flush float32 subnormals: products of that size, and the factor 2 ** -127 itself
            flushed = np.inf if scale == 0 else np.finfo(np.float32).tiny
            result = np.asarray(result)[0]
            exact = np.where((np.abs(expected) < flushed) & (result == 0), result, expected)
            np.testing.assert_array_equal(result, exact)
    w = mk.Mxfp8(jnp.asarray(matrix), jnp.asarray(scales))
    assert w.shape == (32, 256) and w.ndim == 2


@pytest.mark.parametrize(("inputs", "block"), [(32, 32), (96, 32), (64, 64), (192, 64)])
def test_inputs_of_mxfp8_lie_in_the_order_of_registers(inputs, block):
    """A thread's of each 16 are 2 t, 2 t + 1, 2 t + 8, 2 t + 9, and all it has of a block are next to each other."""
    assert interleaved_inputs(inputs) == block
    rows = np.arange(3 * inputs).reshape(3, inputs)
    threads = interleave(rows).reshape(3, inputs // block, 4, block // 16, 4)
    for t in range(4):
        expected = rows.reshape(3, inputs // block, block // 16, 16)[..., [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]]
        np.testing.assert_array_equal(threads[:, :, t], expected)
    np.testing.assert_array_equal(straighten(interleave(rows)), rows)
    np.testing.assert_array_equal(straighten(jnp.asarray(interleave(rows))), rows)


def test_nan_scores_are_selected_and_leave_the_forced_blocks():
    """A broken index branch must not look like a shorter context."""
    scores = jnp.array([[[0.5, jnp.nan, 0.1, 0.2, -jnp.inf]]])
    batch = mk.Batch(jnp.zeros((1, 5), jnp.int32), jnp.array([0, 1]), jnp.array([60]))
    selected = mk.select_blocks(scores, batch, topk=2)
    assert sorted(selected[0, 0].tolist()) == [1, 3]  # the NaN and the local block


def test_zeros_of_both_signs_are_equal_scores():
    scores = jnp.array([[[-0.0, 0.0, -1.0, 0.0, -0.0]]])
    batch = mk.Batch(jnp.zeros((1, 5), jnp.int32), jnp.array([0, 1]), jnp.array([80]))
    selected = mk.select_blocks(scores, batch, topk=3, local_blocks=0)
    assert selected[0, 0].tolist() == [0, 1, 3]
