"""`LLM` over ranks gives one device's tokens: data ranks with pages of their own, copies, penalties."""

import numpy as np
import pytest
from parallel_models import one_device, prompts, spread

from minimax_jax import LLM, SamplingParams
from minimax_jax.parallel import ParallelConfig, ParallelError

SHAPES = {
    "max_batch_size": 4,
    "max_num_tokens": 32,
    "segment_config": {"buckets": (32,)},
    "decode_config": {"batch_sizes": (4,), "page_buckets": (8,)},
    "cache_config": {"page_size": 16, "max_tokens": 24 * 16},
    "max_seq_len": 128,
}


def answers(llm, ids, params):
    return [[answer.token_ids for answer in output.outputs] for output in llm.generate(ids, params)]


@pytest.mark.slow
def test_data_ranks_serve_one_devices_tokens():
    ids = [np.asarray(prompt).tolist() for prompt in prompts(5, 40, 70, 21, 33, 8)]
    ids.append(ids[2][:50])
    params = [SamplingParams(max_tokens=5, seed=i, temperature=0 if i % 2 else 0.9) for i in range(len(ids))]
    params[0] = SamplingParams(max_tokens=5, seed=3, n=2, repetition_penalty=1.4)
    params[3] = SamplingParams(max_tokens=5, seed=4, top_k=5, logit_bias={3: 2.0})
    ahead = {**SHAPES, "decode_config": {**SHAPES["decode_config"], "steps_per_launch": 4}}
    with LLM(one_device(), **SHAPES) as one, LLM(spread(one_device(), (2, 2, 2)), **ahead) as many:
        expected = answers(one, ids, params)
        assert answers(many, ids, params) == expected
        stats = many.stats()
        assert stats.num_pages == 48 and stats.used_pages == 0
        assert all(key.endswith("whole") for key in stats.steps) and stats.launches < sum(stats.steps.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tensor_parallel_size": 3}, ParallelError, "tensor = 3: must be one of 1, 2, 4, 8"),
        ({"tensor_parallel_size": 8, "moe_expert_parallel_size": 3}, ParallelError, "expert = 3"),
        ({"tensor_parallel_size": 16}, ParallelError, "tensor = 16"),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_anything_loads(options, error, message):
    with pytest.raises(error, match=message):
        LLM("tiny", **options)


def test_attention_data_parallelism_takes_the_place_of_tensor_parallelism():
    from minimax_jax.llm import _parallel

    assert _parallel(8, None, True) == ParallelConfig(1, 8, 8) and _parallel(8, 8, False) == ParallelConfig(8, 8, 1)
    assert repr(ParallelConfig(np.int64(2), np.int8(4), np.uint8(2))) == repr(ParallelConfig(2, 4, 2))
    assert _parallel(1, None, False) == ParallelConfig() and _parallel(1, 8, False) == ParallelConfig(1, 8, 1)
