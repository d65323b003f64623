"""Index keys split over ranks: selected blocks, tokens and what each rank holds, against every rank having all keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from parallel_models import cases, four_head_config, name_of, one_device, over_ranks, prompts

from minimax_jax.cache import PagePool
from minimax_jax.parallel import ParallelConfig, ParallelError, Ranks
from minimax_jax.parallel.index_split import merged_blocks, ranked_scores, scores_of
from minimax_jax.parallel.key_stripes import striped_batch
from minimax_jax.tensor_table import cache_bytes_per_token
from minimax_kernels import Batch, index_score, select_blocks, write_index

TOKENS, BLOCKS, BLOCK, CHANNELS, TOPK = 24, 7, 16, 8, 3
REQUESTS = {"prompts": 2, "decode": 24}  # of the two ways in which tokens are put into requests over a rank's keys
TENSORS = {8: (8, 1, 1), 4: (4, 8, 1), 2: (2, 8, 4)}


@functools.cache
def selecting(tensor, heads, init_blocks, local_blocks):
    """(selected by the ranks' own heads, the written cache) of a layout, and the same on one device."""
    config = four_head_config(index_n_heads=heads, num_key_value_heads=heads)
    ranks = Ranks(config, ParallelConfig(*TENSORS[tensor], split_index_keys=True))
    options = {"topk": TOPK, "init_blocks": init_blocks, "local_blocks": local_blocks, "impl": "reference"}
    shape = (TOKENS * BLOCKS, BLOCK, CHANNELS)

    def rank(queries, keys, slots, batch):
        empty = jnp.zeros((shape[0], BLOCK // tensor, CHANNELS))
        cache = ranks.index_split.write(empty, keys, slots, impl="reference")
        return ranks.index_split.select(queries, cache, batch, **options), cache

    shared = ("outer", "inner")
    split = ranks.per_rank(rank, (P(None, shared), P(), P(), P()), (P(shared), P(None, shared)))

    def whole(queries, keys, slots, batch):
        cache = write_index(jnp.zeros(shape), keys, slots, impl="reference")
        return select_blocks(index_score(queries, cache, batch, impl="reference"), batch, **options), cache

    return jax.jit(split), jax.jit(whole)


def step(seed, kv_lens, query_lens, strange):
    """Some requests' last tokens over contexts of any length; few different keys, so that many blocks score alike."""
    random, requests = np.random.default_rng(seed), len(kv_lens)
    room = TOKENS
    for i, wish in enumerate(query_lens):
        query_lens[i] = min(wish, kv_lens[i], room)
        room -= query_lens[i]
    tables = random.permutation(TOKENS * BLOCKS)[: requests * BLOCKS].reshape(requests, BLOCKS)
    slots = np.full(requests * BLOCKS * BLOCK, -1)
    for i, length in enumerate(kv_lens):
        places = np.arange(length)
        slots[i * BLOCKS * BLOCK :][:length] = tables[i, places // BLOCK] * BLOCK + places % BLOCK
    keys = random.integers(-1, 2, (len(slots), 1, CHANNELS)).astype(np.float32)
    keys[random.random(len(slots)) < 0.02, 0, 0] += strange
    queries = random.integers(-1, 2, (TOKENS, 4, CHANNELS)).astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in (tables, starts, kv_lens)))
    return queries, jnp.asarray(keys), jnp.asarray(slots, jnp.int32), batch


@pytest.mark.parametrize(
    ("tensor", "heads", "init_blocks", "local_blocks", "kind"),
    [
        (8, 4, 0, 1, "prompts"),
        (8, 4, 1, 2, "decode"),
        (4, 4, 1, 1, "prompts"),
        (2, 4, 0, 2, "prompts"),
        (2, 1, 0, 0, "decode"),
    ],
)
@settings(max_examples=25)
@given(data=st.data())
def test_selected_blocks_are_those_of_all_keys(tensor, heads, init_blocks, local_blocks, kind, data):
    requests = REQUESTS[kind]
    seed, strange = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.sampled_from([0, 1e30]))
    kv_lens, query_lens = (
        data.draw(st.lists(st.integers(0, most), min_size=requests, max_size=requests))
        for most in (BLOCKS * BLOCK, TOKENS if kind == "prompts" else 1)
    )
    queries, keys, slots, batch = step(seed, kv_lens, query_lens, strange)
    queries = queries[:, :heads]
    split, whole = selecting(tensor, heads, init_blocks, local_blocks)
    expected, cache = whole(queries, keys, slots, batch)
    sharing = max(1, tensor // heads)
    found, striped = split(np.repeat(queries, sharing, axis=1), keys, slots, batch)
    np.testing.assert_array_equal(found, np.repeat(expected, sharing, axis=0))
    # rank r's part of a page holds the keys of offsets r, r + n, ...: every key lies on one rank, and nowhere else
    pages = np.asarray(striped).reshape(-1, tensor, BLOCK // tensor, CHANNELS)
    np.testing.assert_array_equal(np.swapaxes(pages, 1, 2).reshape(cache.shape), cache)


@pytest.mark.parametrize(("init_blocks", "local_blocks"), [(0, 1), (1, 2), (0, 0)])
def test_candidates_of_ranks_keep_the_order_of_selection(init_blocks, local_blocks):
    """Ties, infinities and NaN that every rank has seen a part of; forced blocks come before all but NaN."""
    random = np.random.default_rng(0)
    values = np.array([-1, -0.0, 0.0, 1, 2, np.inf, np.nan], np.float32)
    own = np.arange(TOKENS) % BLOCKS
    visible = np.arange(BLOCKS) <= own[:, None]
    scores = np.where(visible, random.choice(values, (2, TOKENS, BLOCKS)), -np.inf).astype(np.float32)
    worse = np.where(np.arange(BLOCKS) < own[:, None], np.float32(-2), -np.inf)  # no key of the token's own block yet
    parts = np.stack([np.where(random.random(scores.shape) < 0.5, scores, worse) for _ in range(3)])
    winner = random.integers(0, 3, scores.shape)  # has the block's best key, and perhaps others too
    np.put_along_axis(parts, winner[None], scores[None], axis=0)
    ranked = [ranked_scores(part, own, init_blocks=init_blocks, local_blocks=local_blocks) for part in parts]
    batch = Batch(jnp.zeros((1, BLOCKS), jnp.int32), jnp.array([0, TOKENS]), jnp.array([TOKENS]))
    choose = functools.partial(select_blocks, batch=batch, topk=TOPK, impl="reference")
    blocks = [choose(part, init_blocks=0, local_blocks=0) for part in ranked]
    best = [scores_of(part, chosen) for part, chosen in zip(ranked, blocks, strict=True)]
    merged = merged_blocks(jnp.concatenate(best, axis=-1), jnp.concatenate(blocks, axis=-1), topk=TOPK)
    expected = choose(scores, init_blocks=init_blocks, local_blocks=local_blocks)
    np.testing.assert_array_equal(merged, expected)


@pytest.mark.parametrize("sizes", [(8, 8, 1), (4, 8, 1), (2, 8, 4)], ids=name_of)
def test_a_rank_holds_its_part_of_the_index_keys(sizes):
    config, tensor = four_head_config(), sizes[0]
    pools = {}
    for split in (False, True):
        ranks = Ranks(config, ParallelConfig(*sizes, split_index_keys=split))
        pool = PagePool(config, 6, jnp.float32, ranks.cache_placement)
        pool.resize(8)
        shards = [array.addressable_shards[0].data for array in jax.tree.leaves(pool.caches)]
        pools[split] = sum(shard.nbytes for shard in shards), shards[-1].shape
        layout = ranks.layout
        per_token = cache_bytes_per_token(layout.local_config, itemsize=4, index_ranks=layout.index_ranks)
        assert pools[split][0] == 8 * 16 * per_token
        pool.release()
    assert pools[False][1] == (8, 16, 16) and pools[True][1] == (8, 16 // tensor, 16)
    assert pools[False][0] - pools[True][0] == 8 * (16 - 16 // tensor) * 16 * 4


LENGTHS, NEW = (70, 1, 33, 16, 50), 6
SPLIT = [(8, 8, 1), (2, 8, 4), (2, 1, 1), (4, 8, 1), (4, 8, 2)]


@pytest.mark.parametrize("sizes", cases(SPLIT, usual=SPLIT[:2]))
def test_greedy_tokens_equal_one_devices(sizes):
    ids, options = prompts(*LENGTHS), {"max_new_tokens": NEW}
    if sizes == (2, 8, 4):  # the one that always runs: what is rounded, and to what, is the same on every layout
        options["cache_dtype"] = "fp8"
    expected = one_device().generate(ids, **options)
    np.testing.assert_array_equal(over_ranks(sizes, split_index_keys=True).generate(ids, **options), expected)


def test_settings_that_cannot_be():
    with pytest.raises(ParallelError, match="split_index_keys = 1: must be True or False"):
        ParallelConfig(2, split_index_keys=1)
    parallel = ParallelConfig(8, split_index_keys=True)
    with pytest.raises(ParallelError, match="tensor = 8: must divide index_block_size = 4"):
        parallel.check(four_head_config(index_block_size=4), 8)
    ParallelConfig(8).check(four_head_config(index_block_size=4), 8)


@pytest.mark.parametrize("query_lens", [[9, 3], [1, 0], [1, 2]], ids=str)
def test_the_kernels_score_a_ranks_keys(query_lens):
    """Pages of half their keys, requests of every second token, tokens that see none of the rank's keys."""
    random, tensor, page, channels = np.random.default_rng(0), 2, 32, 16
    num_tokens = sum(query_lens)
    kv_lens = [70, max(query_lens[1], 1)]
    batch = Batch(
        jnp.array([[4, 0, 2], [3, 1, 5]]),
        jnp.array([0, query_lens[0], num_tokens]),
        jnp.array(kv_lens),
    )
    keys = jnp.asarray(random.standard_normal((6, page // tensor, channels)), jnp.float32)
    queries = jnp.asarray(random.standard_normal((num_tokens, 2, channels)), jnp.float32)
    for rank in range(tensor):
        striped = striped_batch(batch, num_tokens, rank, tensor)
        rows = queries if striped.order is None else queries[striped.order]
        scores = {
            impl: np.asarray(index_score(rows, keys, striped.batch, impl=impl))
            for impl in ("reference", "pallas_triton_interpret")
        }
        np.testing.assert_allclose(scores["pallas_triton_interpret"], scores["reference"], rtol=1e-5, atol=1e-5)
        seen = (striped.positions - rank) // tensor + 1  # keys; at least one in each block up to the last of them
        blocks = np.isfinite(scores["reference"][0]).sum(axis=-1)
        np.testing.assert_array_equal(blocks, -(-np.asarray(seen) // (page // tensor)))
