"""Products of many rows on Mosaic GPU: in Pallas's GPU interpreter, and lowered for CUDA, without a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_pallas_lowering import KERNEL, SHAPE, imagined_gpu, mxfp8
from test_weight_products import ACTIVATION, rows_of, weight

import minimax_kernels as mk
from minimax_kernels.grouped_matmul.gather_rows import gather_rows
from minimax_kernels.grouped_matmul.row_tiles import EIGHT, cut_rows, rows_in_eights
from minimax_kernels.mosaic_support import LEAST_JAX, require_mosaic_gpu

IMPL = "pallas_mosaic_gpu"
INTERPRET = f"{IMPL}_interpret"
WIDTHS = (48, 32, 16)
needs_api = pytest.mark.skipif(jax.__version_info__ < LEAST_JAX, reason="needs Mosaic GPU of a later JAX")
group_sizes = st.lists(st.integers(0, 150), min_size=5, max_size=5)
cut = jax.jit(functools.partial(cut_rows, num_rows=750, widths=WIDTHS, interpret=True))
gather = jax.jit(functools.partial(gather_rows, interpret=True))


def starts_of(sizes):
    """(first sorted row, first row in eights) of each group."""
    eights = -(-sizes // EIGHT) * EIGHT
    return np.cumsum(sizes) - sizes, np.cumsum(eights) - eights


@settings(max_examples=15, deadline=None)
@given(sizes=group_sizes)
@example(sizes=[0] * 5)
@example(sizes=[49, 1, 0, 48, 97])
def test_tiles_hold_every_row_once_and_the_widest_come_first(sizes):
    sizes = np.array(sizes, np.int32)
    tiles = np.asarray(cut(jnp.asarray(sizes)))
    count, tiles = tiles[0, 0], tiles[1 : 1 + tiles[0, 0]]
    assert count == len(tiles) == sum(-(-size // WIDTHS[0]) for size in sizes)
    assert (np.diff(tiles[:, 2]) >= 0).all()
    starts, starts_in_eights = starts_of(sizes)
    seen = np.zeros(sizes.sum(), int)
    for group, rows, width, in_eights, first in tiles:
        share = -(-sizes[group] // -(-sizes[group] // WIDTHS[0]))  # of the group's tiles, evenly
        assert 0 < rows <= -(-share // EIGHT) * EIGHT <= WIDTHS[width]
        assert width == len(WIDTHS) - 1 or share > WIDTHS[width + 1]
        assert in_eights % EIGHT == 0 and in_eights - starts_in_eights[group] == first - starts[group]
        assert starts[group] <= first and first + rows <= starts[group] + sizes[group]
        seen[first : first + rows] += 1
    assert (seen == 1).all()


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=5, max_size=5), by_source=st.booleans())
def test_rows_are_copied_to_eights(sizes, by_source):
    sizes = np.array(sizes, np.int32)
    random = np.random.default_rng(len(sizes))
    x = rows_of(random, 250, 64)
    source = jnp.asarray(random.integers(0, 250, 250), jnp.int32) if by_source else None
    found = gather(x, jnp.asarray(sizes), source)
    assert found.shape == (rows_in_eights(250, 5), 64)
    expected = x if source is None else x[source]
    for size, first, in_eights in zip(sizes, *starts_of(sizes), strict=True):
        np.testing.assert_array_equal(found[in_eights : in_eights + size], expected[first : first + size])


@needs_api
def test_special_scales_are_marked():
    from minimax_kernels.grouped_matmul.mosaic_dequantize import mark_special

    scales = np.random.default_rng(0).permutation(np.arange(1024) % 256).astype(np.uint8)
    found = np.asarray(mark_special(jnp.asarray(scales.view("<u4")))).view(np.uint8)
    np.testing.assert_array_equal(found, np.where((scales == 0) | (scales == 255), 0x40, 0))


@needs_api
def test_grouped_matmul():
    """Tiles of one accumulator and of two, rows that fill none, no rows, rows past the groups and groups past the rows;
    a NaN scale."""
    random = np.random.default_rng(1)
    x, (w, wide) = rows_of(random, 40, 128), weight(random, 3, 128, 128)
    w = mk.Mxfp8(w.values, w.scales.at[2, 7, 3].set(255))
    run = jax.jit(functools.partial(mk.grouped_matmul, impl=INTERPRET))
    for given_sizes in ([9, 0, 27], [0, 0, 0], [9, 0, 80]):
        found = np.asarray(run(x, w, jnp.array(given_sizes)), np.float64)
        sizes = np.diff(np.minimum(np.cumsum([0, *given_sizes]), 40))
        expected = np.zeros((40, 128))
        for group, (first, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
            expected[first : first + size] = np.asarray(x, np.float64)[first : first + size] @ wide[group]
        expected[sum(sizes[:2]) : sum(sizes), 7] = np.nan
        np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01 * np.nanmax(np.abs(expected)))


@needs_api
def test_routed_experts():
    random = np.random.default_rng(2)
    x, addend = rows_of(random, 11, 128), rows_of(random, 11, 128)
    (gate_up, _), (down, _) = weight(random, 2, 128, 256), weight(random, 2, 128, 128)
    ids = jnp.asarray(random.integers(-1, 3, (11, 3)), jnp.int32)
    weights = jnp.asarray(random.random((11, 3)), jnp.float32)
    run = functools.partial(mk.routed_experts, x, ids, weights, gate_up, down, addend, activation=ACTIVATION)
    found, expected = (np.asarray(run(impl=impl), np.float32) for impl in (INTERPRET, "reference"))
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01 * np.abs(expected).max())


def lowered(op, *args, **options):
    with imagined_gpu():
        function = jax.jit(functools.partial(getattr(mk, op), impl=IMPL, **options))
        return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@needs_api
def test_prefill_of_a_rank_lowers():
    ids, weights = SHAPE((8192, 4), jnp.int32), SHAPE((8192, 4), jnp.float32)
    x, w = SHAPE((8192, 6144), jnp.bfloat16), mxfp8(16, 6144, 6144)
    text = lowered("routed_experts", x, ids, weights, w, mxfp8(16, 3072, 6144), activation=ACTIVATION, num_experts=128)
    assert text.count("@mosaic_gpu") == 2, "[gate | up] and down"
    assert text.count(KERNEL) == 5, "two that sort, tiles, rows and the weighted sum"
    text = lowered("grouped_matmul", SHAPE((300, 6144), jnp.bfloat16), w, SHAPE((16,), jnp.int32))
    assert (text.count("@mosaic_gpu"), text.count(KERNEL)) == (1, 2)


@needs_api
@pytest.mark.parametrize("impl", [IMPL, INTERPRET])
def test_nothing_to_do(impl):
    w = mk.Mxfp8(jnp.zeros((2, 128, 128), jnp.float8_e4m3fn), jnp.zeros((2, 128, 4), jnp.uint8))
    x, none = jnp.zeros((0, 128), jnp.bfloat16), jnp.zeros((0, 4))
    assert mk.grouped_matmul(x, w, jnp.zeros(2, jnp.int32), impl=impl).shape == (0, 128)
    gate_up = jax.tree.map(lambda leaf: jnp.tile(leaf, (1, 2, 1)), w)
    found = mk.routed_experts(x, none.astype(jnp.int32), none, gate_up, w, activation=ACTIVATION, impl=impl)
    assert found.shape == (0, 128)


@needs_api
def test_what_the_kernels_do_not_serve():
    w, _ = weight(np.random.default_rng(0), 2, 128, 128)
    x, sizes = jnp.ones((3, 128), jnp.bfloat16), jnp.array([1, 2])
    run = functools.partial(mk.grouped_matmul, group_sizes=sizes, impl=IMPL)
    with pytest.raises(NotImplementedError, match="pallas_mosaic_gpu: rows are float32, not bfloat16"):
        run(x.astype(jnp.float32), w)
    with pytest.raises(NotImplementedError, match="the weight is bfloat16, not Mxfp8"):
        run(x, jnp.ones((2, 128, 128), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="N = 64 of the weight is not a multiple of 128"):
        run(x, jax.tree.map(lambda leaf: leaf[:, :64], w))
    with pytest.raises(NotImplementedError, match="K = 64 of the weight is not a multiple of 128"):
        run(x[:, :64], mk.Mxfp8(w.values[..., :64], w.scales[..., :2]))
    with pytest.raises(NotImplementedError, match="2 GiB or more"):
        jax.eval_shape(run, SHAPE((3, 32768), jnp.bfloat16), mxfp8(2, 32768, 32768))


def test_older_versions_of_jax_are_refused_before_anything_is_imported(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(NotImplementedError, match="needs jax 0.11"):
        require_mosaic_gpu()
    w = mk.Mxfp8(jnp.zeros((2, 128, 128), jnp.float8_e4m3fn), jnp.zeros((2, 128, 4), jnp.uint8))
    with pytest.raises(NotImplementedError, match="needs jax 0.11"):
        mk.grouped_matmul(jnp.ones((3, 128), jnp.bfloat16), w, jnp.array([1, 2]), impl=IMPL)
