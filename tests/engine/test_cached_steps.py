"""Prefill and decode through paged caches against the full forward without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_prompt, small_model

from minimax_jax.attention import TracedAttend
from minimax_jax.cache import allocate_pages
from minimax_jax.engine.generation import block_tables, generate_tokens, prefill_chunks
from minimax_jax.engine.sampler import sampling_state
from minimax_jax.engine.steps import DecodeState
from minimax_jax.model import merge_model, split_model
from minimax_jax.tensor_table import cache_bytes_per_token
from minimax_kernels import Batch


@pytest.fixture(scope="module")
def model():
    return small_model()


def full_logits(model, ids):
    return np.asarray(model(np.asarray(ids)[None]).logits)[0]


def test_decode_logits_equal_the_full_forward_at_every_position(model):
    """Token by token from an empty cache over permuted pages, across many block edges."""
    ids = random_prompt(70)
    config = model.config
    graphdef, _ = split_model(merge_model(model._graphdef, model.state()))
    table = jnp.array([[5, 2, 7, 0, 4]], jnp.int32)

    @jax.jit
    def step(weights, caches, token, position):
        slot = table[0, position // 16] * 16 + position % 16
        batch = Batch(table, jnp.array([0, 1], jnp.int32), (position + 1)[None])
        attend = TracedAttend(config, caches, batch, slot[None])
        return merge_model(graphdef, weights)(token[None], position[None], attend)[0], attend.caches()

    caches = allocate_pages(config, 8, jnp.float32)
    expected = full_logits(model, ids)
    for position, token in enumerate(ids):
        logits, caches = step(model.state(), caches, jnp.int32(token), jnp.int32(position))
        np.testing.assert_allclose(logits, expected[position], atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("length", [1, 16, 17, 90])
def test_greedy_generation_equals_greedy_by_full_forwards(model, length):
    prompt = random_prompt(length, seed=length)
    got = np.asarray(model.generate([prompt], max_new_tokens=20))[0].tolist()
    logits = full_logits(model, got)
    assert got[:length] == prompt
    assert logits[length - 1 : -1].argmax(axis=-1).tolist() == got[length:]


def test_ragged_batch_equals_each_prompt_alone(model):
    prompts = [random_prompt(n, seed=n) for n in (1, 40, 16, 93, 5)]
    together = np.asarray(model.generate(prompts, max_new_tokens=12))[:, 93:]
    for prompt, row in zip(prompts, together, strict=True):
        alone = np.asarray(model.generate([prompt], max_new_tokens=12))[0, len(prompt) :]
        assert row.tolist() == alone.tolist()


def test_padding_on_either_side_changes_nothing(model):
    prompt = random_prompt(37)
    ids = np.zeros((2, 50), np.int32)
    mask = np.zeros((2, 50), np.int32)
    ids[0, :37], mask[0, :37] = prompt, 1
    ids[1, 13:], mask[1, 13:] = prompt, 1
    new = np.asarray(model.generate(ids, mask, max_new_tokens=8))[:, 50:]
    assert new[0].tolist() == new[1].tolist()
    logits = np.asarray(model(ids, mask).logits)
    np.testing.assert_allclose(logits[0, :37], logits[1, 13:], atol=1e-5)
    np.testing.assert_allclose(logits[0, :37], full_logits(model, prompt), atol=1e-4)
    assert not logits[0, 37:].any() and not logits[1, :13].any()


@pytest.mark.parametrize("most", [1, 7, 33])
def test_chunked_prefill_equals_prefill_in_one_step(model, most):
    prompts = [np.array(random_prompt(n, seed=n), np.int32) for n in (50, 3, 21)]

    def tokens(limit):
        stream = generate_tokens(
            model._steps, model._leaves, model.config, prompts, model.generation_config,
            max_new_tokens=5, seed=0, cache_dtype=jnp.float32, max_prefill_tokens=limit,
        )  # fmt: skip
        return np.stack(list(stream)).tolist()

    assert tokens(most) == tokens(8192)


def test_requests_own_their_pages_and_no_more():
    tables = block_tables([3, 1, 2], 4)
    owned = [tables[0, :3], tables[1, :1], tables[2, :2]]
    assert np.concatenate(owned).tolist() == list(range(6))
    assert tables.shape == (4, 4) and tables.max() == 5


def test_prefill_chunks_cover_every_token_once():
    for most in (1, 4, 9, 100):
        seen = [[] for _ in range(4)]
        for chunk in prefill_chunks([5, 1, 12, 9], most):
            assert 0 < chunk.num_tokens <= most
            for request, start, end in chunk.parts:
                seen[request].extend(range(start, end))
        assert seen == [list(range(n)) for n in (5, 1, 12, 9)]


def test_nothing_is_retraced_for_other_values():
    model = small_model(seed=3)
    model.generate([random_prompt(20)], max_new_tokens=30, do_sample=True, temperature=0.7, top_k=5)
    before = dict(model._steps.traces)
    assert before == {"prefill": 1, "decode": 1}
    model.generate([random_prompt(23, seed=1)], max_new_tokens=29, do_sample=True, temperature=1.3, top_k=9, seed=4)
    assert model._steps.traces == before


def test_caches_are_donated(model):
    config = model.config
    caches = allocate_pages(config, 4, jnp.float32)
    state = DecodeState(jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32), caches)
    tables = jnp.arange(4, dtype=jnp.int32)[None]
    model._steps.decode(
        model._leaves, state, tables, sampling_state(0, 1, 1.0, 1.0, 0, 96), greedy=True, truncated=False
    )
    assert all(pool.is_deleted() for pool in jax.tree.leaves(caches))


def test_rows_of_padding_write_nothing(model):
    """A step with one live row of four leaves every page alone but the live row's."""
    config = model.config
    poison = jax.tree.map(lambda pool: jnp.full_like(pool, 7.0), allocate_pages(config, 8, jnp.float32))
    state = DecodeState(jnp.zeros(4, jnp.int32), jnp.array([3, 0, 0, 0], jnp.int32), poison)
    tables = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    after = model._steps.decode(
        model._leaves, state, tables, sampling_state(0, 4, 1.0, 1.0, 0, 96), greedy=True, truncated=False
    )
    assert after.kv_lens.tolist() == [4, 0, 0, 0]
    for pool in after.caches.k:
        changed = np.argwhere(np.asarray(pool) != 7.0)
        assert set(changed[:, 0]) == {0} and set(changed[:, 2]) == {3}


def test_bytes_per_token_counts_the_pools(model):
    pools = allocate_pages(model.config, 3, jnp.bfloat16)
    held = sum(pool.nbytes for pool in jax.tree.leaves(pools))
    assert held == 3 * model.config.index_block_size * cache_bytes_per_token(model.config)
