"""Prefill and mixed steps through segments: equal to whole steps, bounded, invalidated, shared."""

import collections
import contextlib
import dataclasses
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segmented_steps import (
    assert_close_logits,
    compilations,
    logits_of,
    make_step,
    run_hidden,
    segmented_steps,
    whole_hidden,
)
from small_models import random_prompt, small_config, small_model

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.attention import BoundaryAttend, PagedAttention
from minimax_jax.attention.transfer import _apart
from minimax_jax.buckets import buckets_up_to
from minimax_jax.cache import PagePool
from minimax_jax.engine import cache_sizing
from minimax_jax.engine.cache_sizing import fill_memory, pages_that_fit
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.model import merge_model
from minimax_jax.segmented import BoundaryError, StaleCaptureError
from minimax_jax.segmented.executables import Executables

TABLES = np.array([[5, 2, 7, 0], [1, 3, 9, 4]])


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def steps(model):
    return segmented_steps(model)


def pool_of(model, pages=10):
    return PagePool(model.config, pages, jnp.float32)


def assert_same_pools(left, right):
    for a, b in zip(jax.tree.leaves(left.caches), jax.tree.leaves(right.caches), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def check_equal(model, steps, parts):
    """The parts (query_lens, kv_lens) in turn, against whole steps; three times over: warm-up, capture and replay."""
    made = [make_step(model.config, TABLES[: len(kv)], new, kv, number) for number, (new, kv) in enumerate(parts)]
    whole = pool_of(model)
    expected = [whole_hidden(model, whole, step) for step in made]
    # one pool, since captures belong to it; each turn writes the same keys and values to the same places
    pool, outcomes, before = pool_of(model), [], steps.layers.stats()
    for _ in range(3):
        outcomes.append([run_hidden(steps, model, pool, step) for step in made])
        assert_same_pools(pool, whole)
    for got, other in zip(outcomes[0], expected, strict=True):
        assert_close_logits(logits_of(model, got), logits_of(model, other))
    for again in outcomes[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(outcomes[0], again, strict=True))
    stats = steps.layers.stats()
    assert stats.replays > before.replays or stats.fallbacks == before.fallbacks + 3 * len(made)


@pytest.mark.parametrize(
    "parts",
    [
        [([16], [16])],  # exactly a bucket
        [([17, 12], [17, 12]), ([9, 1], [26, 13])],  # a prompt's next part beside a single token
        [([1, 1], [1, 1]), ([1, 1], [2, 2])],  # nothing but single tokens
        [([40, 25], [40, 25])],  # one above the largest bucket, 64
    ],
    ids=["exact", "mixed", "decode", "above"],
)
def test_segments_equal_whole_steps(model, steps, parts):
    check_equal(model, steps, parts)


@pytest.mark.parametrize("rows", [*(pytest.param(rows, marks=pytest.mark.long) for rows in (24, 48)), 64])
def test_every_bucket_equals_whole_steps(model, steps, rows):
    """Exactly filled, by two requests, and one below."""
    check_equal(model, steps, [([rows - 9, 9], [rows - 9, 9]), ([rows - 1], [rows - 1])])


@pytest.mark.long
def test_segments_of_the_embedded_checkpoint_equal_whole_steps():
    """A prompt over two of its pages, and another beside a single token."""
    tiny = MiniMaxM3ForCausalLM.from_pretrained("tiny", "float32", progress=False)
    steps = segmented_steps(tiny, buckets=(160,))
    check_equal(tiny, steps, [([140, 5], [140, 5]), ([1, 50], [141, 55])])


def test_replays_are_bit_equal_to_the_same_segments_run_eagerly(model, steps):
    step = make_step(model.config, TABLES, [20, 12], [20, 12])  # 32 rows: the exact size is a bucket
    eager = run_hidden(steps, model, pool_of(model), step, eager=True)
    pool = pool_of(model)
    for _ in range(3):
        assert np.array_equal(run_hidden(steps, model, pool, step), eager)
    assert steps.layers.stats().replays > 0


def test_rows_past_the_live_ones_and_other_pages_are_left_alone(model, steps):
    config = model.config
    pool = pool_of(model)
    pool.store(jax.tree.map(lambda p: jnp.full_like(p, 7), pool.caches), pool.epoch.value)
    step = make_step(config, TABLES[:1], [20], [20])
    runtime = steps.attention.step(pool, step.layout)
    key = jax.random.key(0)
    q = jax.random.normal(key, (32, config.num_attention_heads, config.head_dim))
    k = jax.random.normal(key, (32, config.num_key_value_heads, config.head_dim))
    idx_q = jax.random.normal(key, (32, config.index_n_heads, config.index_head_dim))
    for layer_id, index in ((0, (None, None)), (1, (idx_q, idx_q[:, :1]))):
        out = jnp.full((32, q.shape[1] * q.shape[2]), -1.0)
        got = np.asarray(steps.attention.attend(runtime, layer_id, q, k, k, *index, out))
        assert out.is_deleted()
        assert (got[20:] == -1).all() and not (got[:20] == -1).any()
    for pools in (pool.caches.k, pool.caches.v):
        for cache in pools:
            changed = np.argwhere((np.asarray(cache) != 7).any(axis=(1, 3)))  # (page, offset)
            written = [(5, at) for at in range(16)] + [(2, at) for at in range(4)]
            assert {tuple(place) for place in changed.tolist()} == set(written)


def test_caches_are_written_in_place(model, steps):
    pool = pool_of(model)
    step = make_step(model.config, TABLES[:1], [16], [16])
    before = pool.caches
    places = [cache.unsafe_buffer_pointer() for cache in jax.tree.leaves(before)]
    run_hidden(steps, model, pool, step)
    assert all(cache.is_deleted() for cache in jax.tree.leaves(before))
    assert [cache.unsafe_buffer_pointer() for cache in jax.tree.leaves(pool.caches)] == places


def test_serving_compiles_nothing_once_all_combinations_were_met(model):
    """Requests, their lengths, pages and tokens vary from step to step within an envelope that was warmed up."""
    config = model.config
    steps, pool = segmented_steps(model, max_tokens=16), pool_of(model)
    rng = np.random.default_rng(3)
    requests = [1, 2]
    contexts = (1, 20, 40)  # 1, 2 and 3 pages a request, which is the bucket of 4

    def serve(query_lens, kv_lens):
        run_hidden(steps, model, pool, make_step(config, TABLES[: len(kv_lens)], query_lens, kv_lens))

    steps.warm_up(model._leaves, pool)
    for count in requests:
        for rows in steps.layers.buckets:
            for context in contexts:
                lens = np.full(count, max(rows // count, 1))
                serve(lens, np.maximum(lens, context))
    before, traces = compilations(), steps.attention.traces
    for _ in range(25):
        count = int(rng.choice(requests))
        query_lens = rng.integers(1, 16 // count + 1, count)
        serve(query_lens, query_lens + rng.integers(0, 40, count))
    assert compilations() == before and steps.attention.traces == traces
    assert steps.layers.stats().traces == len(steps.layers.buckets)


def test_resizing_while_generating_goes_on_with_the_same_tokens(model):
    prompts = [np.array(random_prompt(n, seed=n), np.int32) for n in (33, 18)]

    def tokens(execution, sizes):
        pool = pool_of(model, 8)
        stream = generate_tokens(
            model._steps, model._leaves, model.config, prompts, model.generation_config, max_new_tokens=10, seed=0,
            cache_dtype=jnp.float32, execution=execution, pool=pool,
        )  # fmt: skip
        result = []
        for number, row in enumerate(stream):
            result.append(row.tolist())
            if number in sizes:
                old = jax.tree.leaves(pool.caches)
                pool.resize(sizes[number])
                assert all(cache.is_deleted() for cache in old)
        return result

    expected = tokens("whole", {})
    assert tokens("segmented", {0: 20, 3: 8, 4: 20}) == expected


def test_every_stale_step_raises_and_the_next_one_serves(model, steps):
    config, pool = model.config, pool_of(model)
    step = make_step(config, TABLES, [10, 6], [10, 6])
    expected = [run_hidden(steps, model, pool, step) for _ in range(3)][-1]
    stale = steps.attention.step(pool, step.layout)
    pool.resize(12)
    for call in (steps.layers, steps.layers.eager):
        with pytest.raises(StaleCaptureError):
            call(model._leaves, step.tokens, step.positions, runtime=stale)
    for _ in range(3):
        assert np.array_equal(run_hidden(steps, model, pool, step), expected)
    stale = steps.attention.step(pool, step.layout)
    caches = pool.caches
    pool.release()
    assert all(cache.is_deleted() for cache in jax.tree.leaves(caches))
    with pytest.raises(StaleCaptureError):
        steps.layers(model._leaves, step.tokens, step.positions, runtime=stale)
    with pytest.raises(StaleCaptureError, match="was released"):
        _ = pool.caches
    with pytest.raises(ValueError, match="must be within 0..-1"):
        steps.attention.step(pool, step.layout)


def warmed_up(model):
    """Steps of two buckets and their pool, after a first recapture, which brings the allocator to its steady state."""
    steps, pool = segmented_steps(model, buckets=(16, 32)), PagePool(model.config, 4, jnp.float32)
    steps.warm_up(model._leaves, pool)
    pool.resize(4, keep=False)
    steps.warm_up(model._leaves, pool)
    return steps, pool


def test_recapture_recompiles_no_segment(model):
    steps, pool = warmed_up(model)
    before, executables = compilations(), steps.layers.stats().executables
    pool.resize(4, keep=False)
    steps.warm_up(model._leaves, pool)
    assert compilations() == before and steps.layers.stats().captured == 2
    traces = steps.attention.traces
    pool.resize(6, keep=False)
    steps.warm_up(model._leaves, pool)
    # only what takes the pool itself: attention of dense and of sparse layers, per bucket, and the pools' zeros
    assert traces == 4 and steps.attention.traces == 8 and compilations() - before <= 4 + 3
    assert steps.layers.stats().executables == executables


@pytest.mark.long  # a time: beside other tests it says nothing
def test_recapture_of_the_embedded_checkpoint_is_quick():
    tiny = MiniMaxM3ForCausalLM.from_pretrained("tiny", progress=False)
    steps, pool = warmed_up(tiny)
    before, seconds = compilations(), []
    for _ in range(10):
        pool.resize(4, keep=False)
        times = []
        for _ in range(2):  # both run every bucket twice, but the second time as replays
            start = time.perf_counter()
            steps.warm_up(tiny._leaves, pool)
            jax.block_until_ready(pool.caches)
            times.append(time.perf_counter() - start)
        seconds.append((times[0] - times[1]) / len(steps.layers.buckets))  # without the steps themselves
    assert compilations() == before and steps.layers.stats().executables == 10
    assert np.median(seconds) < 0.05


def test_small_pool_then_final_pool(model):
    """The two phases of cache sizing: capture over few pages, release, capture over the final ones."""
    steps = segmented_steps(model, buckets=(16, 32))
    pool, device = PagePool(model.config, 2, jnp.float32, model._leaves[0].sharding), jax.devices()[0]
    fill_memory(pool, lambda: steps.warm_up(model._leaves, pool), device, 1, num_pages=10)
    stats = steps.layers.stats()
    assert pool.num_pages == 10 and pool.epoch.value == 1
    assert (stats.captured, stats.captures, stats.invalidations, stats.traces) == (2, 4, 1, 2)
    step = make_step(model.config, TABLES[:1], [14], [14])
    got = run_hidden(steps, model, pool, step)
    assert steps.layers.stats().replays == 1
    np.testing.assert_allclose(got, whole_hidden(model, pool_of(model), step), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="num_pages: must be given"):
        fill_memory(pool, pytest.fail, device, 1)  # before anything is run


def test_pages_fill_the_memory_that_is_left():
    assert pages_that_fit(total=1000, peak=500, small_pool=100, page_bytes=50, fraction=0.9) == 10
    with pytest.raises(ValueError, match="does not hold one page of 50 bytes"):
        pages_that_fit(total=1000, peak=960, small_pool=100, page_bytes=50, fraction=0.9)
    with pytest.raises(ValueError, match=r"memory_fraction = 1.5: must be within \(0, 1\]"):
        pages_that_fit(total=1000, peak=960, small_pool=100, page_bytes=50, fraction=1.5)


class PretendedMemory:
    """A device whose earlier work left a peak of 600 bytes; steps need 150 beside what is in use."""

    def __init__(self):
        self.in_use, self.peak = 200, 600

    def memory_stats(self):
        return {"bytes_limit": 1000, "bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}

    @contextlib.contextmanager
    def take(self, _, count):
        self.in_use += count
        yield
        self.in_use -= count

    def warm_up(self):
        self.peak = max(self.peak, self.in_use + 150)


def test_an_earlier_peak_does_not_make_the_pool_smaller(monkeypatch):
    device = PretendedMemory()
    monkeypatch.setattr(cache_sizing, "taken_memory", device.take)
    pool = PagePool(small_config(), 2, jnp.float32)  # 100 of the 200 bytes in use
    cache_sizing.fill_memory(pool, device.warm_up, device, page_bytes=50, memory_fraction=0.9)
    assert pool.num_pages == 13  # 900 - 100 - 150 bytes
    with cache_sizing.taken_memory(jax.devices()[0], 1000):
        pass


def test_two_hundred_resizes_leak_nothing(model):
    steps, pool = segmented_steps(model, buckets=(16,)), pool_of(model)
    step = make_step(model.config, TABLES[:1], [16], [16])

    def cycle(pages):
        pool.resize(pages, keep=False)
        run_hidden(steps, model, pool, step)

    for _ in range(3):
        cycle(10), cycle(8)
    gc.collect()
    held, count = sum(x.nbytes for x in jax.live_arrays()), compilations()
    for _ in range(100):
        cycle(10), cycle(8)
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) <= held and compilations() == count


def test_two_functions_share_one_pool(model):
    """The first writes a prompt's beginning, the second its end; resizing clears both."""
    one, two = segmented_steps(model, buckets=(16,)), segmented_steps(model, buckets=(16,))
    first = make_step(model.config, TABLES[:1], [16], [16], 1)
    second = make_step(model.config, TABLES[:1], [10], [26], 2)
    whole = pool_of(model)
    whole_hidden(model, whole, first)
    expected = whole_hidden(model, whole, second)
    pool = pool_of(model)
    for _ in range(3):
        run_hidden(one, model, pool, first)
        np.testing.assert_allclose(run_hidden(two, model, pool, second), expected, rtol=1e-4, atol=1e-4)
    assert one.layers.stats().captured == two.layers.stats().captured == 1
    pool.resize(11)
    assert one.layers.stats().captured == two.layers.stats().captured == 0
    np.testing.assert_allclose(run_hidden(two, model, pool, second), expected, rtol=1e-4, atol=1e-4)


def model_of_sixty_layers():
    config = small_config(
        num_hidden_layers=60,
        layer_types=("full_attention",) * 3 + ("minimax_m3_sparse",) * 57,
        mlp_layer_types=("dense",) * 3 + ("sparse",) * 57,
    )
    first = {"layer_types": config.layer_types[:4], "mlp_layer_types": config.mlp_layer_types[:4]}
    state = {}
    for name, leaf in small_model(num_hidden_layers=4, **first).state().items():
        state[name] = leaf
        if name.startswith("layers.3."):  # stands for all later ones
            state |= {name.replace(".3.", f".{i}.", 1): leaf for i in range(4, 60)}
    return MiniMaxM3ForCausalLM(config, state)


def build_sixty_layers(monkeypatch):
    """A run of 60 layers, and of each call that built executables: processor seconds, compilations, its arguments."""
    model, built, build = model_of_sixty_layers(), [], Executables.build

    def watched(executables, split, placement):
        before, start = compilations(), time.process_time()
        result = build(executables, split, placement)
        built.append((time.process_time() - start, compilations() - before, split, placement))
        return result

    monkeypatch.setattr(Executables, "build", watched)
    steps = segmented_steps(model, buckets=(16,))
    step = make_step(model.config, np.zeros((1, 1), int), [16], [16])
    got = run_hidden(steps, model, PagePool(model.config, 2, jnp.float32), step)
    assert got.shape == (16, model.config.hidden_size) and np.isfinite(got).all()
    monkeypatch.undo()
    return steps, built


def test_sixty_layers_are_five_executables(monkeypatch):
    """Five compilations for 61 segments, of which 56 are equal."""
    steps, ((_, compiled, split, _),) = build_sixty_layers(monkeypatch)
    stats = steps.layers.stats()
    assert stats.segments == len(split.segments) == 61 and stats.executables == compiled == 5
    names = collections.Counter(entry.executable.name for entry in steps.layers.program().entries)
    assert sorted(names.values()) == [1, 1, 1, 2, 56]


@pytest.mark.long  # a time: beside other tests it says nothing
def test_sixty_layers_build_in_an_eighth(monkeypatch):
    """Of the processor's time that the 56 equal segments take alone, compiled one by one."""
    steps, ((seconds, _, split, placement),) = build_sixty_layers(monkeypatch)
    names = [entry.executable.name for entry in steps.layers.program().entries]
    most, count = collections.Counter(names).most_common(1)[0]
    segment, before = split.segments[names.index(most)], compilations()
    start = time.process_time()
    Executables("alone", None).build(dataclasses.replace(split, steps=(segment,)), placement)
    alone = time.process_time() - start
    assert count == 56 and compilations() == before + 1
    assert seconds <= count * alone / 8


def test_plain_jit_over_the_boundary_gives_the_same(model, steps):
    step = make_step(model.config, TABLES[:1], [16], [16])
    pool, other = pool_of(model), pool_of(model)
    runtime = steps.attention.step(pool, step.layout)

    @jax.jit
    def run(leaves, tokens, positions):
        merged = merge_model(model._graphdef, dict(zip(model._names, leaves, strict=True)))
        return merged.run_layers(merged.embed(tokens), positions, BoundaryAttend(runtime))

    got = run(model._leaves, step.tokens, step.positions)
    assert_close_logits(logits_of(model, got), logits_of(model, whole_hidden(model, other, step)))
    assert_same_pools(pool, other)


def test_errors_name_the_layer_and_what_is_wrong(model, steps):
    step = make_step(model.config, TABLES[:1], [16], [16])
    arguments = (model._leaves, step.tokens, step.positions)
    with pytest.raises(BoundaryError, match=r"'minimax_m3_attention'\(layer=0\) .*runtime is NoneType: must be a Step"):
        steps.layers(*arguments)
    with pytest.raises(ValueError, match=r"block_tables name pages 5..5: must be within 0..3"):
        steps.attention.step(pool_of(model, 4), step.layout)
    more = make_step(model.config, TABLES[:1], [17], [17])
    less = make_step(model.config, TABLES[:1], [15], [15])
    for other in (more, less):
        with pytest.raises(BoundaryError, match=rf"runtime has {len(other.tokens)} tokens: must be 16, as the call"):
            steps.layers(*arguments, runtime=steps.attention.step(pool_of(model), other.layout))
    with pytest.raises(ValueError, match=r"query_lens = \[3\]: must be at most kv_lens = \[2\]"):
        make_step(model.config, TABLES[:1], [3], [2])
    with pytest.raises(ValueError, match="kv_lens has 65 tokens: must be at most 64"):
        make_step(model.config, TABLES[:1], [3], [65])
    assert np.isfinite(run_hidden(steps, model, pool_of(model), step)).all()


def test_pools_refuse_to_be_empty(model):
    with pytest.raises(ValueError, match="num_pages = 0: must be at least 1"):
        pool_of(model, 0)
    pool = pool_of(model)
    with pytest.raises(ValueError, match="num_pages = -1"):
        pool.resize(-1)
    assert pool.num_pages == 10 and pool.epoch.value == 0


def test_after_a_warm_up_over_all_shapes_no_step_compiles(model):
    """Few numbers of requests and of pages: every mix of tokens, requests and contexts was compiled before."""
    attention = PagedAttention(model.config, request_buckets=(3,), page_buckets=(2, 4))
    steps = segmented_steps(model, buckets=(8, 40), attention=attention)
    pool, told = pool_of(model), []
    steps.warm_up(model._leaves, pool, report=lambda done, of: told.append((done, of)))
    assert told == [(n, 6) for n in range(1, 7)] and attention.traces == 8
    assert steps.layers.stats().captured == 2
    before, random = compilations(), np.random.default_rng(0)
    for _ in range(12):
        requests = random.integers(1, 4)
        past = random.integers(0, 40, requests)
        new = random.integers(1, 13, requests)
        tables = np.array([random.permutation(10)[:4] for _ in range(requests)])
        step = make_step(model.config, tables, new, past + new)
        assert np.isfinite(np.asarray(steps.run_layers(model._leaves, pool, step))[: new.sum()]).all()
    assert compilations() == before and attention.traces == 8


def test_exact_sizes_are_bounded(model):
    """Above the largest bucket, executables of the latest sizes stay and others are freed."""
    config, attention, pool = model.config, PagedAttention(model.config), pool_of(model)
    used = []
    for size in range(17, 23):
        runtime = attention.step(pool, make_step(config, TABLES[:1], [size], [size]).layout)
        q = jnp.asarray(np.ones((size, config.num_attention_heads, config.head_dim), np.float32))
        k = jnp.asarray(np.ones((size, config.num_key_value_heads, config.head_dim), np.float32))
        out = jnp.asarray(np.ones((size, q.shape[1] * q.shape[2]), np.float32))
        attention.attend(runtime, 0, q, k, k, None, None, out, exact=True).block_until_ready()
        used.append(attention._exact.get(size)[0])
    assert [dense._cache_size() for dense in used] == [0, 0, 1, 1, 1, 1] and len(attention._exact) == 4
    assert attention._dense._cache_size() == 0


def test_sizes_that_may_be_endlessly_many_are_sent_without_compiling_for_them(model):
    steps, pool = segmented_steps(model, buckets=(16,)), pool_of(model)
    before = _apart._cache_size()
    for size in (17, 18, 19):  # above the largest bucket
        steps.run_layers(model._leaves, pool, make_step(model.config, TABLES[:1], [size], [size]))
    assert _apart._cache_size() == before


def test_buckets_end_at_the_largest_step():
    assert buckets_up_to(100, 16) == (16, 24, 32, 48, 64, 96, 100)
    assert buckets_up_to(16, 16) == (16,) and buckets_up_to(10, 16) == (10,)
