"""The sampler against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_states import sampling_state

from minimax_jax.engine.sampler import SamplingState, _kept, pick_tokens

VOCAB = 12
_jitted = jax.jit(_kept)
pick = jax.jit(pick_tokens, static_argnames=("greedy", "truncated"))


def kept(scaled, top_k, top_p, min_p=0.0):
    """The mask where all rows have the same parameters."""
    rows = jnp.ones(scaled.shape[0])
    return _jitted(scaled, (rows * top_k).astype(jnp.int32), rows * top_p, rows * min_p)


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
