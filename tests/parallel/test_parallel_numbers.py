"""Logits, selected blocks and greedy tokens over eight devices equal those of one."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from parallel_models import LAYOUTS, VOCAB, cases, name_of, one_device, over_ranks, prompts, spread
from selected_blocks import other_rows, recorded_blocks

from benchmarks.multi_gpu.selections import different_rows, selections
from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.buckets import bucket
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.parallel import ParallelConfig, Ranks

LENGTHS = (150, 1, 33, 16, 50)  # of five requests: two data ranks of eight have none, and none fills its share
NEW = 6


@pytest.fixture(scope="module")
def blocks():
    """What the models of this module attend to."""
    with recorded_blocks() as found:
        yield found


@functools.cache
def recorded(sizes, **options):
    """`one_device()` over ranks, with steps of its own, which `blocks` sees."""
    return spread(one_device(), sizes, **options)


def greedy(model, ids, count):
    return np.asarray(model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=-1))


@pytest.fixture(scope="module")
def expected(blocks):
    model = MiniMaxM3ForCausalLM(one_device().config, one_device().state())
    ids = prompts(*LENGTHS)
    logits, found = blocks.during(lambda: model(ids).logits)
    selected = found[0]
    (whole,) = selected
    assert len(np.unique(whole[:, 100 : LENGTHS[0]], axis=0)) == 4  # the four heads select differently
    tokens = greedy(model, ids, NEW)
    assert len(np.unique(tokens[:, -NEW:])) > NEW  # the choices vary
    return ids, logits, selected, tokens


USUAL = [(8, 1, 1), (8, 8, 1), (4, 8, 1), (1, 8, 8), (2, 8, 4)]


@pytest.mark.parametrize("sizes", cases(LAYOUTS, usual=USUAL))
def test_logits_blocks_and_greedy_tokens_equal_one_devices(sizes, expected, blocks):
    assert_same_numbers(recorded(sizes), expected, blocks)


def assert_same_numbers(model, expected, blocks):
    ids, logits, selected, tokens = expected
    own, found = blocks.during(lambda: model(ids).logits)
    np.testing.assert_allclose(own, logits, rtol=0, atol=1e-4)
    layout, lengths = model.ranks.layout, [len(prompt) for prompt in ids]
    assert sorted(found) == list(range(layout.parallel.num_devices))
    rows = bucket(-(-len(ids) // model.ranks.groups))
    holders = layout.parallel.num_devices // model.ranks.groups  # ranks that attend the same requests
    heads = len(found[0][0])
    compared, other = other_rows(selected, found, layout, lengths, rows)
    assert compared == len(selected) * holders * heads * sum(lengths) and other == 0
    _, other = other_rows([np.roll(whole, 1, axis=0) for whole in selected], found, layout, lengths, rows)
    assert other > 0
    np.testing.assert_array_equal(greedy(model, ids, tokens.shape[1] - max(lengths)), tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "options"), [((1, 8, 8), {"all_to_all_tokens": 20}), ((2, 8, 4), {"hosts": 2})], ids=str
)
def test_other_ways_to_the_experts_give_one_devices_numbers(sizes, options, expected, blocks):
    """All-to-all, in steps with prompts only: the steps after them have fewer tokens. Two hosts."""
    assert_same_numbers(recorded(sizes, **options), expected, blocks)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 8, 1), (2, 8, 4)], ids=name_of)
def test_selected_blocks_are_the_same_where_ranks_share_out_index_keys(sizes):
    """In prompts alone, whose logits above come without a cache: then every rank scores all keys."""
    parallel, tokens = over_ranks(sizes, split_index_keys=True), prompts(200, seed=3)[0]
    expected = selections(one_device(), tokens)
    assert all(len(np.unique(whole[:, 100:], axis=0)) == 4 for whole in expected)  # the four heads select differently
    found, layout = selections(parallel, tokens), parallel.ranks.layout
    assert different_rows(expected, found, layout) == 0
    assert different_rows([np.roll(whole, 1, axis=0) for whole in expected], found, layout) > 0


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param((8, 1, 1), {"temperature": 0.8}, marks=pytest.mark.slow),
        ((2, 8, 4), {"top_k": 5, "top_p": 0.9}),
    ],
    ids=str,
)
def test_sampling_draws_one_devices_tokens_and_brings_no_logits_to_the_host(sizes, options, blocks, monkeypatch):
    ids = prompts(*LENGTHS)
    given = {"max_new_tokens": 5, "do_sample": True, "seed": 3, **options}
    expected = np.asarray(one_device().generate(ids, **given))
    brought, fetch = [], Ranks.fetch
    monkeypatch.setattr(Ranks, "fetch", lambda self, rows: brought.append(rows.size) or fetch(self, rows))
    np.testing.assert_array_equal(recorded(sizes).generate(ids, **given), expected)
    assert brought and max(brought) < VOCAB  # a token a row, padding included


def test_data_ranks_prefill_in_chunks_of_their_own():
    """A long prompt takes several steps, in which ranks that are done join in without tokens."""
    model, ids = recorded((1, 8, 8)), [np.array(prompt, np.int32) for prompt in prompts(*LENGTHS)]
    options = model.generation_config.override(do_sample=False)
    steps = generate_tokens(
        model._steps, model._leaves, model.config, ids, options,
        max_new_tokens=2, seed=0, cache_dtype=jnp.float32, max_prefill_tokens=32,
    )  # fmt: skip
    expected = np.asarray(one_device().generate(prompts(*LENGTHS), max_new_tokens=NEW))[:, -NEW:]
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), expected[:, :2])


TINY_LENGTHS = (1100, 40)  # the first selects 8 of 9 blocks


@pytest.fixture(scope="module")
def embedded(blocks):
    model = MiniMaxM3ForCausalLM.from_pretrained("tiny")
    ids = prompts(*TINY_LENGTHS, seed=1, vocab=2000)
    logits, found = blocks.during(lambda: model(ids).logits)
    selected = found[0]
    assert all((whole[:, TINY_LENGTHS[0] - 1] != np.arange(1, 9)).any() for whole in selected)
    return ids, logits, selected, greedy(model, ids, 4)


@pytest.mark.parametrize("sizes", cases(LAYOUTS, usual=[]))
def test_the_embedded_checkpoint_over_ranks(sizes, embedded, blocks):
    model = MiniMaxM3ForCausalLM.from_pretrained("tiny", parallel=ParallelConfig(*sizes))
    assert_same_numbers(model, embedded, blocks)
    assert model.num_parameters() == MiniMaxM3ForCausalLM.from_pretrained("tiny").num_parameters()
