"""Checks that the tests of every implementation of an operation share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_ops
from numpy_ops import Sample, Shape

import minimax_kernels as mk

SCALE = 0.35
SENTINEL = 777.0


@functools.cache
def jitted(op: str, **options: Any):
    """The operation with static options."""
    return jax.jit(functools.partial(getattr(mk, op), **options))


def fixed_sample(shape: Shape) -> Sample:
    """Without hypothesis: one request of all rows behind a prefix, plus NaN everywhere else."""
    random = np.random.default_rng(5)
    length = shape.N * shape.B - 3
    cache = (shape.P, shape.Hkv, shape.B, shape.D)
    owned = np.zeros((shape.P, shape.B), bool)
    owned[: shape.N] = np.arange(shape.N * shape.B).reshape(shape.N, shape.B) < length

    def values(*size: int) -> np.ndarray:
        return random.standard_normal(size).astype(np.float32)

    return Sample(
        shape=shape,
        tables=np.arange(shape.N)[None],
        starts=np.array([0, shape.T]),
        kv_lens=np.array([length]),
        q=values(shape.T, shape.Hq, shape.D),
        k_cache=np.where(owned[:, None, :, None], values(*cache), np.nan),
        v_cache=np.where(owned[:, None, :, None], values(*cache), np.nan),
        idx_q=values(shape.T, shape.Hi, shape.D),
        index_cache=np.where(owned[..., None], values(shape.P, shape.B, shape.D), np.nan),
    )


def with_fp8_caches(s: Sample) -> Sample:
    """The sample with caches of e4m3, which `numpy_ops` reads as the numbers that they hold."""
    caches = ("k_cache", "v_cache", "index_cache")
    return dataclasses.replace(s, **{name: getattr(s, name).astype(ml_dtypes.float8_e4m3fn) for name in caches})


def options_of(shape: Shape) -> dict[str, int]:
    """Of select_blocks and msa."""
    return {"topk": shape.topk, "init_blocks": shape.init, "local_blocks": shape.local}


def check_attended(result, sentinel_result, expected, live):
    """Equal to NumPy; rows without a token are zero, or what `out` held there."""
    result, kept = np.asarray(result), np.asarray(sentinel_result)
    np.testing.assert_allclose(result, expected, atol=2e-5)
    assert not result[~live].any()
    np.testing.assert_array_equal(kept[live], result[live])
    assert (kept[~live] == SENTINEL).all()


def check_selected(selected, chosen, topk):
    """The chosen blocks in any order, then -1."""
    selected = np.asarray(selected)
    assert selected.dtype == np.int32 and selected.shape == (len(chosen), len(chosen[0]), topk)
    for head, rows in enumerate(chosen):
        for row, blocks in enumerate(rows):
            ids = selected[head, row]
            assert set(ids[: len(blocks)].tolist()) == blocks, (head, row)
            assert (ids[len(blocks) :] == -1).all(), (head, row)


def check_index_score(s: Sample, impl: str | None = None) -> None:
    scores = jitted("index_score", impl=impl)(s.idx_q, s.index_cache, s.batch)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, numpy_ops.index_score(s), atol=1e-5)


def check_select_blocks(s: Sample, seed: int, impl: str | None = None) -> None:
    """Scores of few values: ties are everywhere, and the lower block wins them; any scores in padding rows."""
    shape = s.shape
    random = np.random.default_rng(seed)
    scores = np.full((shape.Hi, shape.T, shape.N), -np.inf, np.float32)
    for row, _, position in s.rows():
        visible = position // shape.B + 1
        scores[:, row, :visible] = random.integers(-2, 2, (shape.Hi, visible))
    scores[:, ~s.live] = random.choice([np.nan, 5.0, -np.inf], (shape.Hi, (~s.live).sum(), shape.N))
    selected = jitted("select_blocks", impl=impl, **options_of(shape))(scores, s.batch)
    check_selected(selected, numpy_ops.select_blocks(s, scores), shape.topk)


def check_dense_attention(s: Sample, impl: str | None = None) -> None:
    run = jitted("dense_attention", scale=SCALE, impl=impl)
    out = np.full_like(s.q, SENTINEL)
    result, kept = (run(s.q, s.k_cache, s.v_cache, s.batch, out=o) for o in (None, out))
    check_attended(result, kept, numpy_ops.attention(s, SCALE), s.live)


def check_sparse_attention(
    s: Sample, seed: int, impl: str | None = None, run: Callable[..., jax.Array] | None = None
) -> None:
    """Arbitrary selections, empty ones too, per KV head or finer; ids past a token's own block add nothing."""
    shape = s.shape
    random = np.random.default_rng(seed)
    heads = max(shape.Hkv, shape.Hi)
    chosen: list[list[set[int]]] = [[set() for _ in range(shape.T)] for _ in range(heads)]
    for row, _, _ in s.rows():
        for head in range(heads):
            count = random.integers(0, min(shape.topk, shape.N) + 1)
            chosen[head][row] = set(random.choice(shape.N, count, replace=False).tolist())
    selected = numpy_ops.as_selection(chosen, shape.topk, random)
    selected[:, ~s.live] = random.integers(-1, shape.N, (heads, (~s.live).sum(), shape.topk))
    run = run or jitted("sparse_attention", scale=SCALE, impl=impl)
    out = np.full_like(s.q, SENTINEL)
    result, kept = (run(s.q, s.k_cache, s.v_cache, selected, s.batch, out=o) for o in (None, out))
    check_attended(result, kept, numpy_ops.attention(s, SCALE, chosen), s.live)


def check_msa(s: Sample, impl: str | None = None) -> None:
    """The whole of it, against the oracle's own selection."""
    shape = s.shape
    run = jitted("msa", scale=SCALE, impl=impl, **options_of(shape))
    out = np.full_like(s.q, SENTINEL)
    args = (s.q, s.k_cache, s.v_cache, s.idx_q, s.index_cache, s.batch)
    result, kept = (run(*args, out=o) for o in (None, out))
    chosen = numpy_ops.select_blocks(s, numpy_ops.index_score(s))
    repeats = max(shape.Hkv // shape.Hi, 1)
    chosen = [rows for rows in chosen for _ in range(repeats)]
    check_attended(result, kept, numpy_ops.attention(s, SCALE, chosen), s.live)
