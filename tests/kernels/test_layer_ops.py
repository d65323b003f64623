"""add_norm, choose_experts and the sorting of pairs, in Pallas's interpreter and in plain jnp, against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minimax_kernels as mk
from minimax_kernels.route_tokens.pallas_triton import partial_logits
from minimax_kernels.routed_experts.sort_few import can_sort_few, sort_few_pairs
from minimax_kernels.routed_experts.sort_many import can_sort_many, sort_many_pairs
from minimax_kernels.routed_experts.sorting import sort_pairs

EXAMPLES = settings(max_examples=20, deadline=None)
IMPLS = ["reference", "pallas_triton_interpret"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("tokens", "dtype"), [(0, "float32"), (3, "float32"), (9, "bfloat16")])
def test_add_norm(impl, tokens, dtype):
    random = np.random.default_rng(tokens)
    x, update = (jnp.asarray(random.standard_normal((tokens, 96)), dtype) for _ in range(2))
    weight = jnp.asarray(random.standard_normal(96), dtype)
    total, normed = mk.add_norm(x, update, weight, eps=1e-5, impl=impl)
    assert total.dtype == normed.dtype == x.dtype
    np.testing.assert_array_equal(total, x + update)
    wide = np.asarray(total, np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * (1 + np.asarray(weight, np.float64))
    tolerance = 1e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(normed, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("experts", [128, 6])
def test_choose_experts(impl, experts):
    """Ties go to the lower id, the bias takes part in the choice only, and the last tile of tokens is not full."""
    run = jax.jit(functools.partial(mk.choose_experts, num_chosen=4, scale=2.0, impl=impl))

    @EXAMPLES
    @given(seed=st.integers(0, 1000), levels=st.sampled_from([3, 1000]))
    def check(seed, levels):
        random = np.random.default_rng(seed)
        logits = (random.integers(-levels, levels, (13, experts)) / levels * 3).astype(np.float32)
        bias = (random.integers(-2, 3, experts) / 4).astype(np.float32)
        ids, weights = run(logits, bias)
        scores = np.asarray(jax.nn.sigmoid(logits))
        expected = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :4]
        np.testing.assert_array_equal(ids, expected)
        chosen = np.take_along_axis(scores, expected, axis=1).astype(np.float64)
        np.testing.assert_allclose(weights, 2 * chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-6)

    check()


@pytest.mark.parametrize(
    ("tokens", "hidden", "experts"), [(1, 96, 16), (3, 6160, 130), (4, 7 * 128, 6), (13, 48, 6), (64, 1056, 128)]
)
def test_route_tokens_chooses_by_the_whole_sum(tokens, hidden, experts):
    """Of integers, whose sums are exact in any order: bit by bit the product and then the choice."""
    routed, of_logits = (
        jax.jit(functools.partial(op, num_chosen=4, scale=2.0, impl="pallas_triton_interpret"))
        for op in (mk.route_tokens, mk.choose_experts)
    )

    @settings(max_examples=4, deadline=None)
    @given(seed=st.integers(0, 1000))
    def check(seed):
        random = np.random.default_rng(seed)
        x = random.integers(-3, 4, (tokens, hidden)).astype(np.float32)
        weight = (random.integers(-8, 9, (hidden, experts)) / 2**7).astype(np.float32)
        bias = random.random(experts, np.float32)
        for found, expected in zip(
            routed(jnp.asarray(x, jnp.bfloat16), weight, bias), of_logits(x @ weight, bias), strict=True
        ):
            np.testing.assert_array_equal(found, expected)

    check()


def test_partial_logits_are_float32_products():
    """Not of TF32 or bfloat16: weights of 24 bits count in full."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((13, 256)), jnp.bfloat16)
    weight = random.standard_normal((256, 48)).astype(np.float32)
    sums = partial_logits(x, jnp.asarray(weight), interpret=True)
    expected = np.asarray(x, np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(np.asarray(sums, np.float64).sum(axis=0), expected, atol=2e-7 * np.abs(expected).max())


def test_the_router_of_few_tokens_says_what_it_does_not_serve():
    run = functools.partial(mk.route_tokens, num_chosen=2, impl="pallas_triton_interpret")
    ids, weights = run(jnp.zeros((0, 32)), jnp.zeros((32, 16)), jnp.zeros(16))
    assert ids.shape == weights.shape == (0, 2)
    with pytest.raises(NotImplementedError, match="65 tokens are more than 64"):
        run(jnp.zeros((65, 32)), jnp.zeros((32, 16)), jnp.zeros(16))
    with pytest.raises(NotImplementedError, match="H = 24 of the weight is not a multiple of 16"):
        run(jnp.zeros((3, 24)), jnp.zeros((24, 8)), jnp.zeros(8))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_logit_makes_weights_of_nan_and_ids_that_exist(impl):
    logits = jnp.zeros((2, 8)).at[1, 5].set(jnp.nan)
    ids, weights = mk.choose_experts(logits, jnp.zeros(8), num_chosen=3, impl=impl)
    assert np.isfinite(weights[0]).all() and np.isnan(weights[1]).all()
    assert (np.asarray(ids) >= 0).all() and (np.asarray(ids) < 8).all()
    assert len(set(np.asarray(ids)[1].tolist())) == 3


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_that_a_bias_rules_out_are_chosen_last_and_once(impl):
    bias = jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    ids, _ = mk.choose_experts(jnp.zeros((1, 4)), bias, num_chosen=3, impl=impl)
    assert ids.tolist() == [[0, 1, 2]]


def sort_in_numpy(ids, experts):
    flat = np.where((ids >= 0) & (ids < experts), ids, experts).reshape(-1)
    order = np.argsort(flat, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return np.bincount(flat, minlength=experts + 1)[:experts], order // ids.shape[1], place.reshape(ids.shape)


@pytest.mark.parametrize(
    ("way", "tokens", "experts"),
    [
        ("one program", 1, 16),
        ("one program", 30, 5),
        ("programs", 700, 5),
        ("programs", 300, 16),
        ("programs", 90, 127),
        ("XLA", 1, 16),
        ("XLA", 30, 5),
        ("XLA", 200, 16),
    ],
)
def test_sorted_pairs(way, tokens, experts):
    sorts = {"one program": sort_few_pairs, "programs": sort_many_pairs}
    if way in sorts:
        run = jax.jit(lambda ids, first: sorts[way](ids, experts, first, interpret=True))
    else:
        run = jax.jit(lambda ids, first: sort_pairs(ids, experts, first))

    @EXAMPLES
    @given(seed=st.integers(0, 1000), spread=st.sampled_from([1, 2, 40]), first=st.sampled_from([0, 3, 112]))
    def check(seed, spread, first):
        ids = np.random.default_rng(seed).integers(-2, spread, (tokens, 3)).astype(np.int32)
        for found, expected in zip(run(ids + first, first), sort_in_numpy(ids, experts), strict=True):
            np.testing.assert_array_equal(found, expected)

    check()


def test_one_program_takes_a_decode_steps_pairs_and_no_prompts():
    assert can_sort_few(64 * 4, 16) and can_sort_few(4, 128) and not can_sort_few(8192 * 4, 16)
    assert can_sort_many(8192 * 4, 16) and can_sort_many(1024 * 4, 127) and not can_sort_many(8192 * 4, 128)
