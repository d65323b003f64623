"""Where top-k and top-p cut, against their definition, by sorting and in Pallas's interpreter; the likeliest tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minimax_kernels as mk

EXAMPLES = settings(max_examples=40, deadline=None)
# (implementation, tokens, candidates): all tokens ranked or held; some of them, of few blocks and of several
WAYS = [
    ("reference", 12, 12), ("reference", 12, 3), ("reference", 700, 2), ("pallas_triton_interpret", 12, 3),
    ("pallas_triton_interpret", 300, 2), ("pallas_triton_interpret", 700, 5), ("pallas_triton_interpret", 9000, 16),
]  # fmt: skip


@functools.cache
def jitted(impl, candidates):
    """The mask of what is kept."""

    def mask(scaled, top_k, top_p, min_p):
        value, token = mk.sampling_cut(scaled, top_k, top_p, min_p, candidates=candidates, impl=impl)
        ids, value, token = jnp.arange(scaled.shape[1]), value[:, None], token[:, None]
        return ((scaled > value) | ((scaled == value) & (ids <= token))) & (scaled >= jnp.log(min_p)[:, None])

    return jax.jit(mask)


def kept_by_definition(scaled, top_k, top_p, min_p):
    """Walk down the ranking until k tokens or p of the probability that is left are reached."""
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[:top_k]
    weights = np.exp(np.array([scaled[i] for i in order], np.float64))
    weights[weights < min_p * (1 - 1e-6)] = 0
    before = np.concatenate([[0.0], np.cumsum(weights / weights.sum())[:-1]])
    within = (before < top_p) | (top_p >= 1)
    return {order[i] for i in range(len(order)) if (within[i] or i == 0) and weights[i] > 0}


@pytest.mark.parametrize(("impl", "vocab_size", "candidates"), WAYS)
def test_what_is_kept_is_what_the_definition_says(impl, vocab_size, candidates):
    """Many equal values over several blocks; rows of one batch whose cuts lie near and far."""

    @EXAMPLES
    @given(
        st.integers(0, 2**16), st.sampled_from([(6, 1.0), (30, 0.25), (10**6, 1e-5)]),
        st.lists(st.integers(0, 40), min_size=4, max_size=4),
        st.lists(st.sampled_from([0.013, 0.31, 0.507, 0.83, 0.9991, 1.0]), min_size=4, max_size=4),
        st.lists(st.sampled_from([0.0, 0.03, 0.41]), min_size=4, max_size=4),
    )  # fmt: skip
    def check(seed, levels, top_k, top_p, min_p):
        most, unit = levels
        scaled = -np.random.default_rng(seed).integers(0, most, (4, vocab_size)).astype(np.float32) * unit
        scaled -= scaled.max(axis=1, keepdims=True)
        top_k = [k if 0 < k < vocab_size else vocab_size for k in top_k]
        given = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32), jnp.asarray(min_p, jnp.float32)
        masks = jitted(impl, candidates)(jnp.asarray(scaled), *given)
        for mask, *row in zip(np.asarray(masks), scaled, top_k, top_p, min_p, strict=True):
            expected = kept_by_definition(*row)
            found = set(np.flatnonzero(mask).tolist())
            # float32 sums of thousands of equal shares may reach top-p a few tokens earlier or later
            assert len(found ^ expected) <= len(expected) * 1e-3, (len(found), len(expected), row[1:])

    check()


@pytest.mark.parametrize("impl", ["reference", "pallas_triton_interpret"])
def test_rows_do_not_depend_on_their_batch_mates(impl):
    random = np.random.default_rng(1)
    scaled = jnp.asarray(random.normal(size=(5, 900)) * 3, jnp.float32)
    scaled -= scaled.max(axis=1, keepdims=True)
    top_k = jnp.array([1, 3, 900, 900, 40], jnp.int32)
    top_p, min_p = jnp.array([1, 0.5, 0.999, 1, 0.9]), jnp.array([0, 0, 0, 0.2, 0])
    run = jitted(impl, 4)
    together = run(scaled, top_k, top_p, min_p)
    for row in range(5):
        own = slice(row, row + 1)
        assert (run(scaled[own], top_k[own], top_p[own], min_p[own]) == together[own]).all()


@pytest.mark.parametrize("impl", ["reference", "pallas_triton_interpret"])
@pytest.mark.parametrize(("vocab_size", "candidates"), [(12, 3), (700, 5)])
def test_the_likeliest_token_stays_however_small_top_p_is(impl, vocab_size, candidates):
    """1e-46 is 0 in float32, 1e-39 may be on a device; then no token was kept, and the first one drawn."""
    scaled = jnp.asarray(np.random.default_rng(2).normal(size=(4, vocab_size)), jnp.float32)
    scaled -= scaled.max(axis=1, keepdims=True)
    all_tokens, nothing = jnp.full(4, vocab_size, jnp.int32), jnp.zeros(4)
    mask = jitted(impl, candidates)(scaled, all_tokens, jnp.array([0, 1e-45, 1e-39, 1e-8]), nothing)
    assert (np.asarray(mask) == np.asarray(scaled == 0)).all()


def test_a_row_whose_cut_lies_near_is_cut_alike_beside_one_whose_does_not():
    """The sums of all ranked tokens round otherwise than those of the likeliest ones."""
    random = np.random.default_rng(3)
    scaled = jnp.asarray(random.normal(size=(64, 2000)) * 4, jnp.float32)
    scaled -= scaled.max(axis=1, keepdims=True)
    weights = np.sort(np.exp(np.asarray(scaled)), axis=1)[:, ::-1]
    at = np.cumsum(weights, axis=1, dtype=np.float32)[:, 9] / weights.sum(axis=1, dtype=np.float32)  # a cut's edge
    top_k, top_p, min_p = jnp.full(64, 2000, jnp.int32), jnp.asarray(at, jnp.float32), jnp.zeros(64)
    run = jitted("reference", 128)
    alone = run(scaled, top_k, top_p, min_p)
    beside = run(scaled, top_k.at[0].set(500), top_p.at[0].set(1.0), min_p)
    assert (alone[1:] == beside[1:]).all() and int(beside[0].sum()) == 500


def test_no_rows():
    none = jnp.zeros(0)
    for impl in ("reference", "pallas_triton_interpret"):
        value, token = mk.sampling_cut(jnp.zeros((0, 300)), none.astype(jnp.int32), none, none, candidates=2, impl=impl)
        assert value.shape == token.shape == (0,)


def test_the_likeliest_tokens_are_those_of_top_k():
    random = np.random.default_rng(0)
    for options in ({}, {"decimals": 0}):
        logits = jnp.asarray(np.round(random.normal(size=(3, 5000)), **{"decimals": 6, **options}), jnp.float32)
        for count in (1, 7, 16):
            for got, expected in zip(mk.likeliest(logits, count), jax.lax.top_k(logits, count), strict=True):
                assert (got == expected).all()
