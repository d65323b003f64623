"""After a warm-up over all shapes, serving compiles nothing."""

import numpy as np
import pytest
from segmented_steps import compilations
from serving import PAGE, small_llm
from small_models import VOCAB, small_model

from minimax_jax import LLM, SamplingParams
from minimax_jax.engine.step_inputs import GREEDY, SAMPLED
from minimax_jax.engine.step_runner import StepRunner


def test_serving_compiles_nothing_after_a_warm_up_over_all_shapes():
    shapes = {
        "max_batch_size": 3,
        "max_num_tokens": 32,
        "max_seq_len": 6 * PAGE,
        "segment_config": {"buckets": (32,), "enabled": "always"},
        "decode_config": {"batch_sizes": (3,), "page_buckets": (2, 6)},
    }
    with small_llm(small_model(), warm_up="all", **shapes) as llm:
        before, random = compilations(), np.random.default_rng(0)
        for options in ({"top_k": 5}, {}, {"top_p": 0.9, "min_p": 0.1}):
            prompts = [random.integers(0, VOCAB, random.integers(1, 70)).tolist() for _ in range(5)]
            params = [SamplingParams(temperature=float(t % 2), max_tokens=6, seed=t, **options) for t in range(5)]
            outputs = llm.generate(prompts, params)
            assert all(output.error is None for output in outputs)
        assert compilations() == before


@pytest.mark.parametrize(("steps", "loops"), [(1, set()), (4, {GREEDY, SAMPLED})])
def test_a_warm_up_of_the_largest_steps_runs_the_sampled_loop_and_the_greedy_one(monkeypatch, steps, loops):
    seen = set()

    def warm_up(runner, kind, *shape, loops=(SAMPLED,)):
        if kind == "decode" and runner.config.steps_per_launch > 1:
            seen.update((*shape, features) for features in loops)

    monkeypatch.setattr(StepRunner, "warm_up", warm_up)
    small_llm(small_model(), warm_up=True, steps=steps).close()
    assert seen == {(8, 8, 32, features) for features in loops}


def test_other_warm_ups_are_refused():
    with pytest.raises(ValueError, match="warm_up = 'most': must be None, True, False or 'all'"):
        LLM(small_model(), warm_up="most")
