"""Logits, greedy tokens and selected blocks over eight devices equal those of one."""

import jax.numpy as jnp
import numpy as np
import pytest
from parallel_models import LAYOUTS, OFTEN, cases, name_of, one_device, over_ranks, prompts

from benchmarks.multi_gpu.selections import different_rows, selections
from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.parallel import ParallelConfig

LENGTHS = (70, 1, 33, 16, 50)  # of five requests: two data ranks of eight have none, and none fills its share
NEW = 6


@pytest.fixture(scope="module")
def expected():
    model = one_device()
    ids = prompts(*LENGTHS)
    logits = np.asarray(model(ids).logits)
    tokens = np.asarray(model.generate(ids, max_new_tokens=NEW))
    assert len(np.unique(tokens[:, -NEW:])) > NEW  # the choices vary
    return ids, logits, tokens


@pytest.mark.parametrize("sizes", cases(LAYOUTS, OFTEN))
def test_logits_and_greedy_tokens_equal_one_devices(sizes, expected):
    assert_same_numbers(over_ranks(sizes), expected)


def assert_same_numbers(model, expected):
    ids, logits, tokens = expected
    np.testing.assert_allclose(model(ids).logits, logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=NEW), tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "options"), [((1, 8, 8), {"all_to_all_tokens": 20}), ((2, 8, 4), {"hosts": 2})], ids=str
)
def test_other_ways_to_the_experts_give_one_devices_numbers(sizes, options, expected):
    """All-to-all, in steps with prompts only: the steps after them have fewer tokens. Two hosts."""
    assert_same_numbers(over_ranks(sizes, **options), expected)


@pytest.mark.parametrize("sizes", cases(LAYOUTS, [(8, 1, 1), (2, 8, 4)]))
def test_selected_blocks_are_the_same_in_every_layout(sizes):
    assert_same_selections(over_ranks(sizes))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 8, 1), (2, 8, 4)], ids=name_of)
def test_selected_blocks_are_the_same_where_ranks_share_out_index_keys(sizes):
    assert_same_selections(over_ranks(sizes, split_index_keys=True))


def assert_same_selections(parallel):
    tokens = prompts(200, seed=3)[0]
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
def test_sampling_draws_one_devices_tokens(sizes, options):
    ids = prompts(*LENGTHS)
    given = {"max_new_tokens": 5, "do_sample": True, "seed": 3, **options}
    expected = np.asarray(one_device().generate(ids, **given))
    np.testing.assert_array_equal(over_ranks(sizes).generate(ids, **given), expected)


def test_data_ranks_prefill_in_chunks_of_their_own():
    """A long prompt takes several steps, in which ranks that are done join in without tokens."""
    model, ids = over_ranks((1, 8, 8)), [np.array(prompt, np.int32) for prompt in prompts(*LENGTHS)]
    options = model.generation_config.override(do_sample=False)
    steps = generate_tokens(
        model._steps, model._leaves, model.config, ids, options,
        max_new_tokens=2, seed=0, cache_dtype=jnp.float32, max_prefill_tokens=32,
    )  # fmt: skip
    expected = np.asarray(one_device().generate(prompts(*LENGTHS), max_new_tokens=NEW))[:, -NEW:]
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), expected[:, :2])


@pytest.mark.slow
def test_the_embedded_checkpoint_over_eight_ranks():
    ids = prompts(200, 150, seed=1, vocab=2000)
    one = MiniMaxM3ForCausalLM.from_pretrained("tiny")
    model = MiniMaxM3ForCausalLM.from_pretrained("tiny", parallel=ParallelConfig(tensor=8, expert=8))
    np.testing.assert_allclose(model(ids).logits, one(ids).logits, rtol=0, atol=1e-4)
    tokens = one.generate(ids, max_new_tokens=4, do_sample=False)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    assert model.num_parameters() == one.num_parameters()
