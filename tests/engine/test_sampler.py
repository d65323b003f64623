"""The sampler against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_states import sampling_state

from minimax_jax.engine.likeliest import likeliest
from minimax_jax.engine.sampler import SamplingState, _kept, pick_tokens

VOCAB = 12
_jitted = jax.jit(_kept, static_argnames="candidates")
pick = jax.jit(pick_tokens, static_argnames=("greedy", "truncated"))


def kept(scaled, top_k, top_p, min_p=0.0, **options):
    """The mask where all rows have the same parameters."""
    rows = jnp.ones(scaled.shape[0])
    return _jitted(scaled, (rows * top_k).astype(jnp.int32), rows * top_p, rows * min_p, **options)


def kept_by_definition(logits, top_k, top_p):
    """Walk down the ranking until k tokens or p probability are reached."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = np.exp(np.array([logits[i] for i in order], np.float64) - max(logits))
    weights /= weights.sum()
    kept, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= top_p and top_p < 1:
            break
        kept.add(token)
        mass += weight
    return kept


@given(
    st.lists(st.integers(-6, 6), min_size=VOCAB, max_size=VOCAB),
    st.integers(0, VOCAB),
    st.sampled_from([0.013, 0.31, 0.507, 0.83, 0.999, 1.0]),
)
def test_top_k_and_top_p_keep_what_they_should(logits, top_k, top_p):
    scaled = jnp.array([logits], jnp.float32)
    expected = kept_by_definition([float(x) for x in logits], top_k, top_p)
    for candidates in (VOCAB, 3):  # the whole vocabulary, and where that need not be sorted
        mask = kept(scaled, top_k or VOCAB, top_p, candidates=candidates)
        assert set(np.flatnonzero(mask[0]).tolist()) == expected


@pytest.mark.parametrize("options", [{"top_k": 1, "top_p": 1.0}, {"top_k": 0, "top_p": 1e-6}])
def test_narrow_sampling_is_greedy(options):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, VOCAB)), jnp.float32)
    state = sampling_state(0, 5, 1.0, options["top_p"], options["top_k"], VOCAB)
    picked = pick(logits, jnp.arange(5), state, greedy=False, truncated=True)
    assert picked.tolist() == logits.argmax(-1).tolist()


def test_samples_follow_the_distribution():
    """Frequencies of 20,000 draws over positions against softmax(logits / temperature)."""
    logits = jnp.asarray([[0.0, 1.0, 2.0, -1.0]])
    draws, temperature = 20_000, 1.7
    state = sampling_state(3, draws, temperature, 1.0, 0, 4)
    picked = pick(jnp.repeat(logits, draws, 0), jnp.arange(draws), state, greedy=False, truncated=False)
    frequency = np.bincount(np.asarray(picked), minlength=4) / draws
    expected = np.exp(np.asarray(logits[0]) / temperature)
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=0.015)


def test_top_p_one_and_top_k_off_change_no_draw():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(64, VOCAB)), jnp.float32)
    state = sampling_state(5, 64, 0.9, 1.0, 0, VOCAB)
    positions = jnp.arange(64)
    plain = pick(logits, positions, state, greedy=False, truncated=False)
    sorted_path = pick(logits, positions, state, greedy=False, truncated=True)
    assert plain.tolist() == sorted_path.tolist()


def test_rows_of_one_batch_keep_to_their_own_parameters():
    """Greedy, hot, cut and seeded rows together draw what each draws alone."""
    random = np.random.default_rng(4)
    logits = jnp.asarray(random.normal(size=(6, VOCAB)), jnp.float32)
    state = SamplingState(
        temperature=jnp.array([0, 0.7, 1.5, 1, 1, 3], jnp.float32),
        top_p=jnp.array([1, 1, 0.5, 1, 0.9, 1], jnp.float32),
        min_p=jnp.array([0, 0, 0, 0.4, 0, 0], jnp.float32),
        top_k=jnp.array([VOCAB, 3, VOCAB, VOCAB, 2, VOCAB], jnp.int32),
        seeds=jnp.array([1, 2, 3, 4, 5, 2**32 - 1], jnp.uint32),
        streams=jnp.array([0, 0, 1, 0, 7, 0], jnp.uint32),
    )
    for position in range(20):
        positions = jnp.full(6, position)
        together = pick(logits, positions, state, greedy=False, truncated=True)
        for row in range(6):
            own = jax.tree.map(lambda x, row=row: x[row : row + 1], state)
            alone = pick(logits[row : row + 1], positions[:1], own, greedy=False, truncated=True)
            assert alone[0] == together[row]
        assert together[0] == logits[0].argmax() and together[1] in jnp.argsort(-logits[1])[:3]


def test_min_p_keeps_tokens_that_are_likely_enough_beside_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.26, 0.14, 0.1] + [1e-9] * 8]))
    for least, count in ((0.0, 12), (0.1, 4), (0.25, 3), (0.5, 2), (1.0, 1)):
        mask = kept(logits, VOCAB, 1.0, least)
        assert mask.sum() == count and mask[0, 0]


@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=40), st.integers(0, 400), st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05]), st.integers(0, 2**16),
)  # fmt: skip
def test_rows_of_a_large_vocabulary_keep_the_same_whether_it_is_sorted_or_not(values, top_k, top_p, min_p, seed):
    """Many equal logits over several blocks; rows of one batch that need the sort and rows that do not."""
    random = np.random.default_rng(seed)
    logits = jnp.asarray(random.choice(values, (2, 700)) + random.choice([0.0, 0.25], (2, 700)), jnp.float32)
    whole = kept(logits, top_k or 700, top_p, min_p, candidates=700)
    assert (kept(logits, top_k or 700, top_p, min_p, candidates=2) == whole).all()


def test_the_likeliest_tokens_are_those_of_top_k():
    random = np.random.default_rng(0)
    for options in ({}, {"decimals": 0}):
        logits = jnp.asarray(np.round(random.normal(size=(3, 5000)), **{"decimals": 6, **options}), jnp.float32)
        for count in (1, 7, 16):
            for got, expected in zip(likeliest(logits, count), jax.lax.top_k(logits, count), strict=True):
                assert (got == expected).all()
