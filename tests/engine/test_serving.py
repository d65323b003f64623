"""Many requests at once give the tokens that each gives alone, whatever happens to the pages meanwhile."""

import asyncio
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from serving import check_log_probabilities, check_nothing_left, checked, random_requests, small_llm
from small_models import random_prompt, small_model

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.llm import LLM

LONG = (pytest.mark.slow, pytest.mark.long)
FEW = 23  # pages: the longest request alone needs 20


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def alone(model):
    """Tokens of requests one at a time, without reuse, computed once each."""
    known = {}
    with small_llm(model, pages=FEW, reuse=False) as llm:

        def tokens(prompt, params):
            key = (tuple(prompt), str(params))
            if key not in known:
                known[key] = [answer.token_ids for answer in llm.generate([prompt], params)[0].outputs]
            return known[key]

        yield tokens


async def serve(llm, requests, cancelled, random):
    """Random arrivals; some stop listening after a token or before the first."""

    async def one(index, prompt, params):
        await asyncio.sleep(random.uniform(0, 0.3))
        stream = llm.generate_async(prompt, params)
        outputs = []
        async for output in stream:
            outputs.append(output)
            if index in cancelled:
                break
        await stream.aclose()
        return outputs[-1]

    return await asyncio.gather(*(one(i, *request) for i, request in enumerate(requests)))


@pytest.mark.parametrize(
    ("count", "reuse", "steps"), [(16, True, 4), pytest.param(16, False, 1, marks=LONG),
                                  pytest.param(200, True, 1, marks=LONG), pytest.param(200, True, 4, marks=LONG)],
)  # fmt: skip
def test_requests_that_come_and_go_give_the_tokens_that_each_gives_alone(model, alone, count, reuse, steps):
    random = np.random.default_rng(count)
    requests = random_requests(count, 300, seed=count)
    cancelled = set(random.choice(count, count // 6, replace=False).tolist())
    with checked(small_llm(model, pages=FEW, reuse=reuse, steps=steps)) as llm:
        outputs = asyncio.run(serve(llm, requests, cancelled, random))
        check_nothing_left(llm)
        stats = llm.stats()
    assert (stats.evicted > 0) == reuse and (sum(stats.steps.values()) > stats.launches) == (steps > 1)
    for index, (output, request) in enumerate(zip(outputs, requests, strict=True)):
        expected = alone(*request)[0]
        if index in cancelled:
            assert output.outputs[0].token_ids == expected[: len(output.outputs[0].token_ids)]
        else:
            assert output.finished and output.outputs[0].token_ids == expected
            check_log_probabilities(output, *request)


def test_segments_give_the_same_tokens(model, alone):
    requests = random_requests(8, 40, seed=3)
    with small_llm(model, pages=FEW, enabled="always", warm_up=True) as llm:
        outputs = llm.generate(*map(list, zip(*requests, strict=True)))
        steps = llm.stats().steps
    assert steps["prefill, segmented"] > 0 and steps["decode, whole"] > 0
    for output, request in zip(outputs, requests, strict=True):
        assert [answer.token_ids for answer in output.outputs] == alone(*request)


def test_a_second_prompt_computes_only_what_follows_the_common_pages(model, alone):
    """Index keys included: the sparse layer selects among blocks that another request wrote."""
    common, params = random_prompt(200), SamplingParams(temperature=0, max_tokens=8)
    first, second = common + random_prompt(9, seed=1), common + random_prompt(11, seed=2)
    with small_llm(model, pages=FEW) as llm:
        llm.generate([first], params)
        before = llm.stats().prompt_tokens
        output = llm.generate([second], params)[0]
        assert output.num_cached_tokens == 192 and llm.stats().prompt_tokens - before == len(second) - 192
        again = llm.generate([second], params)[0]
        assert again.num_cached_tokens == 208  # pages that its own prompt filled
    assert output.outputs[0].token_ids == again.outputs[0].token_ids == alone(second, params)[0]


@pytest.mark.parametrize("count", [496, pytest.param(4000, marks=pytest.mark.long)])
def test_common_tokens_are_not_computed_again_and_their_index_keys_decide(model, count):
    config = dataclasses.replace(model.config, max_position_embeddings=4096)
    longer, params = MiniMaxM3ForCausalLM(config, model.state()), SamplingParams(temperature=0, max_tokens=12)
    shapes = {
        "max_num_tokens": 512,
        "segment_config": {"buckets": (512,), "enabled": False},
        "decode_config": {"batch_sizes": (8,), "page_buckets": (256,)},
    }
    common = random_prompt(count)
    first, second = common + random_prompt(20, seed=1), common + random_prompt(30, seed=2)

    def answer(llm, prompt):
        """Its tokens, and how many of the prompt were computed."""
        before = llm.stats().prompt_tokens
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        computed = llm.stats().prompt_tokens - before
        assert output.error is None and output.num_cached_tokens == len(prompt) - computed
        return output.outputs[0].token_ids, computed

    with small_llm(longer, pages=300, **shapes) as fresh:
        alone, computed = answer(fresh, second)
        assert computed == count + 30
    with small_llm(longer, pages=300, **shapes) as llm:
        assert answer(llm, first)[1] == count + 20
        assert answer(llm, second) == (alone, 30) and answer(llm, second) == (alone, 14)
        with llm._core.runner.pool.borrow() as lent:  # keys and values stay as they are
            lost = tuple(None if keys is None else jnp.zeros_like(keys) for keys in lent.caches.index)
            lent.caches = dataclasses.replace(lent.caches, index=lost)
        without, computed = answer(llm, second)
        assert computed == 14 and without != alone


@pytest.mark.parametrize("rest", [1, 2])
def test_prompt_tokens_are_counted_where_a_step_computes_one_of_each_row(model, rest):
    with small_llm(model, pages=FEW) as llm:
        for prompt, computed in ((random_prompt(80), 80), (random_prompt(80 + rest), rest), ([7], 1)):
            before = llm.stats().prompt_tokens
            llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4))
            assert llm.stats().prompt_tokens - before == computed


def test_answers_of_one_prompt_differ_and_equal_those_of_a_batch_of_its_own(model, alone):
    params = SamplingParams(n=4, temperature=1.2, max_tokens=10, seed=7)
    prompt = random_prompt(37)
    with checked(small_llm(model, pages=FEW)) as llm:
        outputs = llm.generate([prompt, random_prompt(90, seed=5), prompt], params)
        check_nothing_left(llm)
    answers = [answer.token_ids for answer in outputs[0].outputs]
    assert len({tuple(tokens) for tokens in answers}) > 1 and [a.index for a in outputs[0].outputs] == [0, 1, 2, 3]
    assert answers == [answer.token_ids for answer in outputs[2].outputs] == alone(prompt, params)


@pytest.mark.parametrize(("reuse", "steps"), [(True, 4), (False, 1)])
def test_answers_that_outgrow_the_pages_wait_and_go_on_as_if_nothing_had_been(model, alone, reuse, steps):
    """Eight answers of six pages each over 23: the youngest lose theirs, some more than once, and start again."""
    penalty = {"repetition_penalty": 1.2}
    requests = [
        (
            random_prompt(30, seed=i),
            SamplingParams(max_tokens=60, seed=i, ignore_eos=True, **(penalty if i % 2 else {})),
        )
        for i in range(8)
    ]
    with checked(small_llm(model, pages=FEW, reuse=reuse, steps=steps)) as llm:
        outputs = llm.generate(*map(list, zip(*requests, strict=True)))
        check_nothing_left(llm)
        assert llm.stats().preemptions > 3
    for output, request in zip(outputs, requests, strict=True):
        assert [answer.token_ids for answer in output.outputs] == alone(*request)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("enabled", [False, "always"], ids=["whole", "segmented"])
def test_two_hundred_requests_of_up_to_six_thousand_tokens(enabled):
    """Everything at once: mixed sampling, random arrival, cancellations, pages for hardly more than one of them."""
    model, random, requests = small_model(max_position_embeddings=6400), np.random.default_rng(9), []
    shapes = {
        "max_num_tokens": 512,
        "segment_config": {"buckets": (512,), "enabled": enabled},
        "decode_config": {"batch_sizes": (8,), "page_buckets": (400,)},
    }
    requests = random_requests(200, 6000, seed=6)
    cancelled = set(random.choice(200, 30, replace=False).tolist())
    with checked(small_llm(model, pages=430, **shapes)) as llm:
        outputs = asyncio.run(serve(llm, requests, cancelled, random))
        check_nothing_left(llm)
        assert llm.stats().evicted > 0 and llm.stats().reuse_found > 0
    whole = {**shapes, "segment_config": {"buckets": (512,), "enabled": False}}
    with small_llm(model, pages=430, reuse=False, **whole) as llm:
        for index, (output, (prompt, params)) in enumerate(zip(outputs, requests, strict=True)):
            expected = llm.generate([prompt], params)[0].outputs[0].token_ids
            got = output.outputs[0].token_ids
            assert got == expected[: len(got)] and (output.finished or index in cancelled)


@pytest.mark.slow
@pytest.mark.long
def test_memory_stays_flat_over_ten_thousand_requests(model):
    import gc
    import tracemalloc

    import jax

    params = [SamplingParams(max_tokens=3, seed=i) for i in range(500)]
    prompts = [random_prompt(int(n), seed=i) for i, n in enumerate(np.random.default_rng(0).integers(1, 60, 500))]

    def held():
        gc.collect()
        return tracemalloc.get_traced_memory()[0], sum(array.nbytes for array in jax.live_arrays())

    with small_llm(model, pages=FEW) as llm:
        llm.generate(prompts, params)
        tracemalloc.start()
        llm.generate(prompts, params)
        before = held()
        for _ in range(18):
            llm.generate(prompts, params)
        after = held()
        tracemalloc.stop()
    assert after[1] <= before[1] and after[0] - before[0] < 200_000


@pytest.mark.slow
@pytest.mark.long
def test_long_prompts_of_the_embedded_checkpoint():
    """Prompts of up to 6000 tokens, many of which begin alike, over pages for two of them."""
    options = {"max_batch_size": 4, "max_num_tokens": 512, "max_seq_len": 6144, "dtype": "float32"}
    shapes = {"segment_config": {"buckets": (512,)}, "decode_config": {"batch_sizes": (4,), "page_buckets": (48,)}}
    requests = random_requests(8, 6000, seed=2, vocab=2000)
    with LLM("tiny", cache_config={"max_tokens": 100 * 128}, **options, **shapes) as llm:
        outputs = llm.generate(*map(list, zip(*requests, strict=True)))
        assert llm.stats().evicted > 0 and llm.stats().reuse_found > 0
    with LLM("tiny", cache_config={"max_tokens": 100 * 128, "enable_reuse": False}, **options, **shapes) as llm:
        for output, (prompt, params) in zip(outputs, requests, strict=True):
            assert output.outputs[0].token_ids == llm.generate([prompt], params)[0].outputs[0].token_ids
