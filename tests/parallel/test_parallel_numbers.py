"""Logits, greedy tokens and selected blocks over eight devices equal those of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from parallel_models import LAYOUTS, OFTEN, cases, name_of, one_device, over_ranks, prompts

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.attention import ReferenceAttend
from minimax_jax.attention.paged import write_index_keys
from minimax_jax.engine.generation import generate_tokens
from minimax_jax.model import SINGLE_DEVICE, abstract_model, merge_model, split_model
from minimax_jax.parallel import ParallelConfig
from minimax_kernels import index_score, select_blocks

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
    ids, logits, tokens = expected
    model = over_ranks(sizes)
    np.testing.assert_allclose(model(ids).logits, logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=NEW), tokens)


class SelectionRecorder(ReferenceAttend):
    """Keeps the blocks that each index head selects, by layer."""

    def __init__(self, *args, index_split=None):
        super().__init__(*args)
        self.selected, self.index_split = [], index_split

    def __call__(self, layer_id, q, k, v, idx_q, idx_k):
        if idx_k is not None:
            ranks = 1 if self.index_split is None else self.index_split.size
            pages = jnp.zeros((self.num_pages, self.config.index_block_size // ranks, idx_k.shape[2]), idx_k.dtype)
            pages = write_index_keys(pages, idx_k, self.slots, self.index_split, impl="reference")
            topk = self.config.index_topk_blocks
            if self.index_split is None:
                scores = index_score(idx_q, pages, self.batch, impl="reference")
                selected = select_blocks(scores, self.batch, topk=topk, impl="reference")
            else:
                selected = self.index_split.select(idx_q, pages, self.batch, topk=topk, impl="reference")
            self.selected.append(selected)
        return super().__call__(layer_id, q, k, v, idx_q, idx_k)


def selections(model, tokens):
    """[index heads of all ranks, T, topk] of every sparse layer, of one prompt that every data rank is given."""
    ranks, count = model.ranks, len(tokens)
    config = model.config if ranks is None else ranks.layout.local_config
    graphdef, _ = split_model(abstract_model(config, jnp.float32))
    comm = SINGLE_DEVICE if ranks is None else ranks.comm

    def run(leaves, tokens):
        split = None if ranks is None else ranks.index_split
        attend = SelectionRecorder(config, jnp.array([0, count]), count, index_split=split)
        merged = merge_model(graphdef, dict(zip(model._names, leaves, strict=True)))
        merged.run_layers(merged.embed(tokens, comm), jnp.arange(count), attend, comm)
        return attend.selected

    if ranks is not None:
        every = P(("data", "replica", "outer", "inner"))
        run = ranks.per_rank(run, (ranks.weight_specs(model._names), P()), every)
    return [np.asarray(layer) for layer in jax.jit(run)(model._leaves, jnp.asarray(tokens, jnp.int32))]


@pytest.mark.parametrize("sizes", cases(LAYOUTS, [(8, 1, 1), (2, 8, 4)]))
def test_selected_blocks_are_the_same_in_every_layout(sizes):
    assert_same_selections(over_ranks(sizes))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 8, 1), (2, 8, 4)], ids=name_of)
def test_selected_blocks_are_the_same_where_ranks_share_out_index_keys(sizes):
    assert_same_selections(over_ranks(sizes, split_index_keys=True))


def assert_same_selections(parallel):
    tokens = prompts(200, seed=3)[0]
    expected = selections(one_device(), tokens)
    layout = parallel.ranks.layout
    for whole, found in zip(expected, selections(parallel, tokens), strict=True):
        assert len(np.unique(whole[:, 100:], axis=0)) == 4  # the four heads select differently
        by_rank = np.split(found, layout.parallel.num_devices)
        for rank, part in enumerate(by_rank):
            heads = layout.take(np.arange(4)[None], layout.splits("layers.1.self_attn.index_q_proj"), rank)[0]
            np.testing.assert_array_equal(part, whole[heads])


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
