"""Page pools: resized while steps run, too small for a generation, and out of memory."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmented_steps import make_step, run_hidden, segmented_steps
from small_models import random_prompt, small_config, small_model

from minimax_jax.cache import PagePool
from minimax_jax.cache import pool as pool_module
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.segmented import StaleCaptureError


@pytest.fixture(scope="module")
def model():
    return small_model()


def generating(model, pool, execution="whole", count=6):
    return generate_tokens(
        model._steps, model._leaves, model.config, [np.array(random_prompt(33), np.int32)], model.generation_config,
        max_new_tokens=count, seed=0, cache_dtype=jnp.float32, execution=execution, pool=pool,
    )  # fmt: skip


def resizing_inside(pool, function):
    """`function`, whose arguments another thread tries to replace once they are consumed; and that thread."""
    threads = []

    def run(*args, **options):
        result = function(*args, **options)
        threads.append(threading.Thread(target=pool.resize, args=(7,)))
        threads[-1].start()
        threads[-1].join(0.2)
        return result

    return run, threads


def check_intact(pool, pages, threads=()):
    for thread in threads:
        thread.join()
    assert pool.num_pages == pages
    assert {cache.shape[0] for cache in jax.tree.leaves(pool.caches)} == {pages}
    assert not any(cache.is_deleted() for cache in jax.tree.leaves(pool.caches))


def test_a_resize_waits_until_a_layer_is_stored(model, monkeypatch):
    steps, pool = segmented_steps(model, buckets=(16,)), PagePool(model.config, 4, jnp.float32)
    slow, threads = resizing_inside(pool, steps.attention._dense)
    monkeypatch.setattr(steps.attention, "_dense", slow)
    lend = pool.borrow_layer

    def lend_after_the_resize(layer_id, life):  # so that the resize, not the next layer, gets the pool first
        for thread in threads:
            thread.join()
        return lend(layer_id, life)

    monkeypatch.setattr(pool, "borrow_layer", lend_after_the_resize)
    with pytest.raises(StaleCaptureError):  # the layer after it
        run_hidden(steps, model, pool, make_step(model.config, [[0]], [9], [9]))
    check_intact(pool, 7, threads)


def test_a_resize_waits_for_whole_steps(model, monkeypatch):
    pool = PagePool(model.config, 4, jnp.float32)
    expected = [row.tolist() for row in generating(model, pool)]
    slow, threads = resizing_inside(pool, model._steps.layers)
    monkeypatch.setattr(model._steps, "layers", slow)
    assert [row.tolist() for row in generating(model, pool)] == expected
    check_intact(pool, 7, threads)


def test_a_borrower_cannot_resize_its_own_loan():
    pool = PagePool(small_config(), 2, jnp.float32)
    with pool.borrow(), pytest.raises(RuntimeError, match="is lent to a step of this very thread"):
        pool.resize(3)
    pool.resize(3)
    assert pool.num_pages == 3


@pytest.mark.parametrize("execution", ["whole", "eager"])
def test_a_pool_that_became_too_small_is_an_error(model, execution):
    pool = PagePool(model.config, 4, jnp.float32)
    stream = generating(model, pool, execution)
    next(stream)
    pool.resize(1)
    with pytest.raises(ValueError, match=r"block_tables name pages 0..2: must be within 0..0, the pool's"):
        list(stream)


def test_pages_that_stay_keep_their_contents_without_further_copies():
    pool = PagePool(small_config(), 4, jnp.float32)
    pool.store(jax.tree.map(lambda c: jnp.arange(c.size, dtype=c.dtype).reshape(c.shape), pool.caches), 0)
    before = jax.tree.map(np.asarray, pool.caches)
    for pages in (6, 6, 3):
        pool.resize(pages)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(pool.caches), strict=True):
            kept = min(pages, 3)
            assert new.shape[0] == pages and np.array_equal(new[:kept], old[:kept])
            assert pages == 3 or not np.asarray(new[4:]).any()
    old = pool.caches.k[0]
    for pages in (2, 9):
        fitting = pool_module._fitting(old.shape[0], pages, None).lower(old).compile()
        text = fitting.as_text()
        assert text.count(" pad(") + text.count(" slice(") <= 2 and "scatter" not in text
        assert fitting.memory_analysis().temp_size_in_bytes == 0


def no_room(*args, **options):
    raise MemoryError("no room")


def test_a_failed_resize_leaves_an_empty_pool_that_can_be_resized(monkeypatch):
    pool = PagePool(small_config(), 4, jnp.float32)
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "allocate_pages", no_room)
        with pytest.raises(MemoryError):
            pool.resize(8, keep=False)
    assert pool.num_pages == 0
    with pytest.raises(StaleCaptureError, match="a resize failed; resize it or make a new one"):
        _ = pool.caches
    pool.resize(3)
    check_intact(pool, 3)


@pytest.mark.parametrize(("pages", "left"), [(8, 4), (2, 0)])
def test_a_failed_resize_that_keeps_pages(monkeypatch, pages, left):
    """Growing is undone; what shrinking has cut off is lost, and the pool with it."""
    pool = PagePool(small_config(), 4, jnp.float32)
    real, calls = pool_module._resized, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError("no room")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "_resized", fail)
        with pytest.raises(MemoryError):
            pool.resize(pages)
    assert pool.num_pages == left and pool.epoch.value > 0
    if left:
        assert {cache.shape[0] for cache in jax.tree.leaves(pool.caches)} == {left}
    pool.resize(5)
    assert {cache.shape[0] for cache in jax.tree.leaves(pool.caches)} == {5}


def test_contents_that_a_failed_step_consumed_are_not_kept():
    pool = PagePool(small_config(), 4, jnp.float32)
    pool.caches.k[1].delete()
    with pytest.raises(RuntimeError, match="keep = True: a failed step has consumed pages"):
        pool.resize(5)
    pool.resize(5, keep=False)
    assert pool.num_pages == 5


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens_are_refused_at_once(model, count):
    with pytest.raises(ValueError, match=f"max_new_tokens = {count}: must be at least 1"):
        generating(model, PagePool(model.config, 4, jnp.float32), count=count)
