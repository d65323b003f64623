"""Prefill and decode through paged caches against the full forward without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_prompt, small_model

from minimax_jax.attention import TracedAttend
from minimax_jax.cache import allocate_pages
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.engine.step_inputs import StepInputs
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


def test_nothing_is_retraced_for_other_values():
    model = small_model(seed=3)
    model.generate([random_prompt(20)], max_new_tokens=30, do_sample=True, temperature=0.7, top_k=5)
    before = dict(model._steps.traces)
    assert before == {"layers": 2, "pick": 1, "decode": 0}  # prompts and decoding are two shapes
    model.generate([random_prompt(23, seed=1)], max_new_tokens=29, do_sample=True, temperature=1.3, top_k=9, seed=4)
    assert model._steps.traces == before


def decode_inputs(config, kv_lens, tables):
    """One token for each row that has a context, which lies on its pages; others are padding."""
    kv_lens, tables, rows = np.array(kv_lens), np.array(tables), np.arange(len(kv_lens))
    place, block = np.maximum(kv_lens - 1, 0), config.index_block_size
    slots = np.where(kv_lens > 0, tables[rows, place // block] * block + place % block, -1)
    starts = np.concatenate([[0], np.cumsum(kv_lens > 0)])
    arrays = (0 * rows, 0 * rows - 1, place, slots, tables, starts, kv_lens)
    tokens, sources, positions, slots, *batch = (jnp.asarray(array, jnp.int32) for array in arrays)
    return StepInputs(tokens, sources, positions, slots, Batch(*batch), tokens)


def test_caches_are_donated(model):
    caches = allocate_pages(model.config, 4, jnp.float32)
    step = decode_inputs(model.config, [2], [[0, 1, 2, 3]])
    model._steps.layers(model._leaves, caches, jnp.zeros(1, jnp.int32), step)
    assert all(pool.is_deleted() for pool in jax.tree.leaves(caches))


def test_rows_of_padding_write_nothing(model):
    """A step with one live row of four leaves every page alone but the live row's."""
    config = model.config
    poison = jax.tree.map(lambda pool: jnp.full_like(pool, 7.0), allocate_pages(config, 8, jnp.float32))
    step = decode_inputs(config, [4, 0, 0, 0], np.arange(8).reshape(4, 2))
    _, _, after = model._steps.layers(model._leaves, poison, jnp.zeros(4, jnp.int32), step)
    for pool in after.k:
        changed = np.argwhere(np.asarray(pool) != 7.0)
        assert set(changed[:, 0]) == {0} and set(changed[:, 2]) == {3}


def test_bytes_per_token_counts_the_pools(model):
    pools = allocate_pages(model.config, 3, jnp.bfloat16)
    held = sum(pool.nbytes for pool in jax.tree.leaves(pools))
    assert held == 3 * model.config.index_block_size * cache_bytes_per_token(model.config)
