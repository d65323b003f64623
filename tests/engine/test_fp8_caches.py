"""Caches of e4m3 through the engine: what comes out is exactly what keys and values rounded to e4m3 give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import PAGE, small_llm
from small_models import random_prompt, small_model

from minimax_jax import SamplingParams
from minimax_jax.attention import ReferenceAttend
from minimax_jax.cache import PagePool
from minimax_jax.model import merge_model
from minimax_kernels import FP8

LENGTH = 60


@pytest.fixture(scope="module")
def model():
    return small_model()


class RoundedAttend(ReferenceAttend):
    """Attention without caches over keys and values that went through e4m3; beyond 448 there are none here."""

    def __call__(self, layer_id, q, k, v, idx_q, idx_k):
        k, v, idx_k = (None if x is None else x.astype(FP8).astype(x.dtype) for x in (k, v, idx_k))
        return super().__call__(layer_id, q, k, v, idx_q, idx_k)


@pytest.fixture(scope="module")
def rounded_logits(model):
    """The model's logits of LENGTH tokens over rounded keys and values."""

    @jax.jit
    def run(weights, ids):
        attend = RoundedAttend(model.config, jnp.array([0, LENGTH]), LENGTH)
        return merge_model(model._graphdef, weights)(ids, jnp.arange(LENGTH), attend)

    return lambda ids: np.asarray(run(model.state(), jnp.asarray(ids, jnp.int32)))


def test_a_context_that_is_carried_along(model, rounded_logits):
    """In two calls, the pool growing between them: `past_key_values` of e4m3."""
    ids = random_prompt(LENGTH, seed=4)
    past = model.empty_past_key_values(1, cache_dtype="fp8")
    logits = [model([ids[a:b]], past_key_values=past).logits[0] for a, b in ((0, 30), (30, LENGTH))]
    assert past.dtype == FP8 and {pool.dtype for pool in jax.tree.leaves(past.pool.caches)} == {jnp.dtype(FP8)}
    expected = rounded_logits(ids)
    np.testing.assert_allclose(np.concatenate(logits), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("execution", ["whole", "segmented"])
def test_generated_tokens(model, rounded_logits, execution):
    prompt = random_prompt(40)
    got = np.asarray(model.generate([prompt], max_new_tokens=20, cache_dtype="fp8", execution=execution))[0].tolist()
    assert rounded_logits(got)[39:-1].argmax(axis=-1).tolist() == got[40:]


def test_unknown_cache_types_are_named(model):
    message = "cache_dtype = 'int8': must be 'auto', 'bfloat16', 'float32' or 'fp8'"
    with pytest.raises(ValueError, match=message):
        model.generate([[1, 2]], cache_dtype="int8")
    with pytest.raises(ValueError, match="cache_config: dtype = 'e4m3': must be 'auto', .* or 'fp8'"):
        small_llm(model, cache_config={"dtype": "e4m3"})


def test_shared_pages(model):
    """Answers that fork inside a page, which is copied, and a prompt that finds its pages again."""
    prompt = random_prompt(40)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    alone = np.asarray(model.generate([prompt], max_new_tokens=12, cache_dtype="fp8"))[0, 40:].tolist()
    with small_llm(model, cache_config={"dtype": "fp8", "page_size": PAGE, "max_tokens": 40 * PAGE}) as llm:
        assert llm._core.runner.pool.caches.k[0].dtype == FP8
        (first,) = llm.generate([prompt], SamplingParams(n=2, seed=3, max_tokens=12))
        (again,) = llm.generate([prompt], greedy)
        assert llm.stats().reuse_found == 2
    assert again.outputs[0].token_ids == alone
    assert first.outputs[0].token_ids != first.outputs[1].token_ids


def test_pools_take_a_quarter_of_float32_and_keep_what_they_hold(model):
    wide, narrow = (PagePool(model.config, 2, dtype) for dtype in ("float32", FP8))
    sizes = [sum(pool.nbytes for pool in jax.tree.leaves(pools.caches)) for pools in (wide, narrow)]
    assert sizes[0] == 4 * sizes[1]
    with narrow.borrow() as lent:
        lent.caches = jax.tree.map(lambda pool: jnp.full_like(pool, 7), lent.caches)
    narrow.resize(3)
    kept = np.asarray(narrow.caches.k[1], np.float32)
    assert (kept[:2] == 7).all() and not kept[2].any()
