"""Segments over ranks, with host-side attention, against whole steps: tokens, selected blocks, resized pools."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_collectives import collectives
from parallel_models import LAYOUTS, name_of, one_device, prompts, spread

from minimax_jax import LLM, SamplingParams
from minimax_jax.attention import StepLayout, paged, step_layout
from minimax_jax.cache import PagePool
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.engine.segmented_prefill import FlatStep
from minimax_jax.parallel.config import TOKENS
from minimax_jax.segmented import StaleCaptureError
from minimax_kernels.sparse_attention import reference as sparse_reference

LENGTHS, NEW = (70, 1, 33, 16, 50), 4
# (sizes, whether index keys are shared out)
REPLICAS, GROUPS = ((4, 8, 1), False), ((2, 8, 4), True)
MORE = [((2, 1, 1), True), ((4, 8, 1), True), ((8, 8, 1), False), ((2, 8, 4), False), ((1, 8, 8), False)]
EVERY = [*MORE[:2], *((sizes, False) for sizes in LAYOUTS)]


def over(*often, long=MORE):
    """Layouts for `model`: these, and others that take long."""
    marked = [(case, pytest.mark.slow) for case in often]
    marked += [(case, pytest.mark.long) for case in long if case not in often]
    params = [pytest.param(case, id=f"{name_of(case[0])}-{case[1]}", marks=mark) for case, mark in marked]
    return pytest.mark.parametrize("model", params, indirect=True)


class Selections(collections.Counter):
    """How often blocks were selected for the tokens of one step, layer and rank; padding left out."""

    def recording(self, attend):
        """Sparse attention that counts what was selected for it."""

        def recorded(q, k_cache, v_cache, selected, *args, **options):
            jax.debug.callback(self.add, selected)
            return attend(q, k_cache, v_cache, selected, *args, **options)

        return recorded

    def add(self, selected):
        selected = np.asarray(selected)
        self[selected[:, (selected >= 0).any(axis=(0, 2))].tobytes()] += 1

    def taken(self):
        """The counts since the last time."""
        jax.effects_barrier()
        found = dict(self)
        self.clear()
        return found


@pytest.fixture(scope="module")
def selections():
    found = Selections()
    with pytest.MonkeyPatch.context() as patch:
        # by msa, and where ranks share out index keys
        patch.setattr(sparse_reference, "sparse_attention", found.recording(sparse_reference.sparse_attention))
        patch.setattr(paged, "sparse_attention", found.recording(paged.sparse_attention))
        yield found


@pytest.fixture(scope="module")
def model(request, selections):
    """A model over ranks, none of whose steps was compiled without `selections`."""
    sizes, split = request.param
    return spread(one_device(), sizes, split_index_keys=split)


@pytest.fixture(scope="module")
def whole(model, selections):
    """(tokens, selected blocks) of whole steps, whose tokens other tests compare with one device's."""
    selections.taken()  # what other tests have left
    tokens = np.asarray(model.generate(prompts(*LENGTHS), max_new_tokens=NEW, execution="whole"))
    return tokens, selections.taken()


@over(REPLICAS, GROUPS, MORE[2], MORE[4], long=EVERY)
def test_tokens_and_selected_blocks_are_those_of_whole_steps(model, whole, selections):
    tokens, selected = whole
    np.testing.assert_array_equal(model.generate(prompts(*LENGTHS), max_new_tokens=NEW, execution="segmented"), tokens)
    assert selections.taken() == selected and len(selected) >= NEW  # another one in each step
    assert model.steps.segmented.layers.stats().warmups == 1


@over(GROUPS)
def test_a_pool_that_is_resized_while_generating(model, whole):
    """Every step through segments at its exact size, those of decode too."""
    pool = PagePool(model.config, 20, jnp.float32, model.ranks.cache_placement)
    ids = [np.array(prompt, np.int32) for prompt in prompts(*LENGTHS)]
    stream = generate_tokens(
        model.steps, model.leaves, model.config, ids, model.generation_config.override(do_sample=False),
        max_new_tokens=NEW, seed=0, cache_dtype=jnp.float32, execution="eager", pool=pool,
    )  # fmt: skip
    columns = []
    for number, tokens in enumerate(stream):
        columns.append(tokens)
        if number == 1:
            old = jax.tree.leaves(pool.caches)
            pool.resize(24)
            assert all(cache.is_deleted() for cache in old)
    np.testing.assert_array_equal(np.stack(columns, axis=1), whole[0][:, -NEW:])
    assert model.steps.segmented.layers.stats().eager == NEW


def steps_of(model):
    """For each data rank a prompt of its own length; the last of several has none."""
    groups, page, found = model.ranks.groups, model.config.index_block_size, []
    for group in range(groups):
        count = 30 - 3 * group if group < groups - 1 or groups == 1 else 0
        lens = np.full(1 if count else 0, count)
        layout = step_layout(np.array([[3, 1]])[: len(lens)], lens, lens, page)
        tokens = np.array(prompts(count, seed=group)[0], np.int32)
        found.append(FlatStep(tokens, np.arange(count, dtype=np.int32), layout))
    return found


def live_rows(model, steps, hidden):
    rows = np.asarray(hidden).reshape(model.ranks.groups, -1, model.config.hidden_size)
    return [own[: len(step.tokens)] for own, step in zip(rows, steps, strict=True)]


def check_collectives(ranks, segments, runtime):
    """A dense and a sparse layer with experts in segments; and what is behind their boundaries."""
    program, parallel = segments.layers.program(), ranks.layout.parallel
    sent = [collectives(entry.executable.compiled.as_text()) for entry in program.entries]
    counts = collections.Counter(kind for found in sent for kind, _ in found)
    heads, tokens = parallel.tensor > 1, parallel.size(TOKENS) > 1
    expected = {"all-reduce": 2 * heads + 3 * tokens}  # the embedding's is one
    if parallel.attention_data > 1:
        expected |= {"all-gather": 2, "reduce-scatter": 1}
    assert counts == collections.Counter(expected)
    config, rows = ranks.layout.local_config, program.signature.rows

    def own(*shape):
        sharding = jax.sharding.NamedSharding(ranks.mesh, ranks.carried)
        return jax.ShapeDtypeStruct((ranks.mesh.size, rows, *shape), jnp.float32, sharding=sharding)

    q, k = own(config.num_attention_heads, config.head_dim), own(config.num_key_value_heads, config.head_dim)
    index = own(config.index_n_heads, config.index_head_dim), own(1, config.index_head_dim)
    out, pool = own(config.num_attention_heads * config.head_dim), runtime.pool.caches
    rest = runtime.on_device(rows)
    dense = segments.attention._dense.lower(pool.k[0], pool.v[0], out, q, k, k, *rest)
    assert not collectives(dense.compile().as_text())
    sparse = segments.attention._sparse.lower(pool.k[1], pool.v[1], pool.index[1], out, q, k, k, *index, *rest)
    found = collectives(sparse.compile().as_text())
    if ranks.index_split is None:
        assert not found
        return
    assert sorted(kind for kind, _ in found) == ["all-gather", "all-to-all"]
    # queries of all heads and candidates of 32 tokens: no cache, which a test of few pages cannot tell by its size
    own_heads = max(1, 4 // parallel.tensor)
    candidates = 2 * rows * 2 * own_heads
    assert {size for _, size in found} <= {
        rows * 16 * max(4, parallel.tensor),
        candidates,
        candidates * parallel.tensor,
    }


@over(GROUPS)
def test_captures_of_an_earlier_life_of_the_pool_are_refused_and_made_anew(model):
    segments, steps = model.steps.segments((32,)), steps_of(model)
    pool = PagePool(model.config, 4, jnp.float32, model.ranks.cache_placement)

    def run():
        return live_rows(model, steps, segments.run_layers(model.leaves, pool, *steps))

    first = [run() for _ in range(3)][-1]
    stats = segments.layers.stats()
    assert (stats.warmups, stats.captures, stats.replays) == (1, 1, 1)
    stale = segments.attention.step(pool, *(step.layout for step in steps))
    tokens, positions = stale.send(32, [step.tokens for step in steps], [step.positions for step in steps])
    pool.resize(6)
    with pytest.raises(StaleCaptureError):
        segments.layers(model.leaves, tokens, positions, runtime=stale, live=30)
    for _ in range(3):
        for got, wanted in zip(run(), first, strict=True):
            assert np.array_equal(got, wanted)
    after = segments.layers.stats()
    check_collectives(model.ranks, segments, stale)
    assert (after.warmups, after.captures, after.replays) == (2, 2, 2) and after.invalidations == 1
    assert after.executables == stats.executables and after.compile_seconds == stats.compile_seconds
    pool.release()
    with pytest.raises(ValueError, match="must be within 0..-1"):
        run()


@over(GROUPS)
def test_every_data_rank_needs_a_layout(model):
    pool = PagePool(model.config, 1, jnp.float32, model.ranks.cache_placement)
    none = StepLayout(np.zeros((0, 1), np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    with pytest.raises(ValueError, match=rf"layouts: 9 of them, must be {model.ranks.groups}, one for each data rank"):
        model.steps.segmented.attention.step(pool, *[none] * 9)


@pytest.mark.long
def test_the_engine_serves_one_devices_tokens_through_segments():
    """Reused and copied pages, penalties, mixed steps; each data rank its own requests."""
    ids = [np.asarray(prompt).tolist() for prompt in prompts(5, 40, 70, 21, 33)]
    ids += [ids[2][:50], ids[2][:49]]
    params = [SamplingParams(max_tokens=5, seed=i, temperature=0 if i % 2 else 0.9) for i in range(len(ids))]
    params[0] = SamplingParams(max_tokens=5, seed=3, n=2, repetition_penalty=1.4)
    shapes = {
        "max_batch_size": 4,
        "max_num_tokens": 32,
        "max_seq_len": 128,
        "segment_config": {"buckets": (32,), "enabled": "always"},
        "decode_config": {"batch_sizes": (4,), "page_buckets": (8,)},
        "cache_config": {"page_size": 16, "max_tokens": 24 * 16},
    }
    found = []
    for served in (one_device(), spread(one_device(), (2, 2, 2), split_index_keys=True)):
        with LLM(served, **shapes) as llm:
            outputs = llm.generate(ids, params)
            found.append([[answer.token_ids for answer in output.outputs] for output in outputs])
            again = llm.generate(ids[2:], params[2:])  # over pages that hold their beginnings
            assert [[answer.token_ids for answer in output.outputs] for output in again] == found[-1][2:]
            assert any(key.endswith("segmented") for key in llm.stats().steps)
    assert found[0] == found[1]
