"""Several decode steps a launch give what one a launch gives, and rows end in the middle of a launch."""

import asyncio
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from segmented_steps import compilations
from serving import check_nothing_left, checked, small_llm
from small_models import VOCAB, random_prompt, small_model

import minimax_jax
from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.engine.core import RunAhead
from minimax_jax.engine.engine_config import DecodeConfig
from minimax_jax.engine.errors import NonFiniteLogitsError
from minimax_jax.engine.graph_options import LOOPS_IN_GRAPHS, GraphedLoop
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.step_inputs import EVERYTHING

STEPS, POISON = 4, VOCAB - 1
PARAMS = {"temperature": 1.3, "max_tokens": 23, "ignore_eos": True, "logprobs": 2, "logit_bias": {POISON: -100}}


@pytest.fixture(scope="module")
def model():
    """Whoever sees one of its tokens has no finite logits; its texts are those of the embedded tokenizer."""
    whole = small_model()
    state = whole.state()
    state["embed_tokens"] = state["embed_tokens"].at[POISON].set(jnp.nan)
    texts = Path(minimax_jax.__file__).parent / "tiny_m3"
    return MiniMaxM3ForCausalLM(whole.config, state, directory=texts)


@pytest.fixture(scope="module")
def one(model):
    """One step a launch, without reuse."""
    with small_llm(model, steps=1, reuse=False) as shared:
        yield shared


@pytest.fixture(scope="module")
def ahead(model):
    with checked(small_llm(model, steps=STEPS)) as shared:
        yield shared


def prompts(count, length=20):
    return [[token % POISON for token in random_prompt(length, seed=i)] for i in range(count)]


def answers(outputs):
    return [answer for output in outputs for answer in output.outputs]


def check_same(outputs, expected):
    """Log probabilities up to rounding: the two engines' steps of prompts are not the same ones."""
    for got, own in zip(answers(outputs), answers(expected), strict=True):
        plain = [dataclasses.replace(each, logprobs=None, cumulative_logprob=None) for each in (got, own)]
        assert plain[0] == plain[1]
        for mine, others in zip(got.logprobs, own.logprobs, strict=True):
            ranks = [{token: each.rank for token, each in tokens.items()} for tokens in (mine, others)]
            assert ranks[0] == ranks[1]
            for token, each in mine.items():
                assert each.logprob == pytest.approx(others[token].logprob, abs=1e-4)


def test_tokens_and_log_probabilities_are_those_of_single_steps(one, ahead):
    given = prompts(5)
    params = [SamplingParams(seed=i, **{**PARAMS, "n": 1 + i % 2}) for i in range(5)]
    expected = one.generate(given, params)
    before = ahead.stats()
    got = ahead.generate(given, params)
    after = ahead.stats()
    check_same(got, expected)
    check_same(ahead.generate(given, params), expected)
    launches = after.launches - before.launches
    steps = sum(after.steps.values()) - sum(before.steps.values())
    assert launches <= 12 and steps >= 24 and ahead.stats().reuse_found > before.reuse_found
    check_nothing_left(ahead)


def test_answers_end_in_the_middle_of_a_launch(one, ahead):
    """By stop string, stop id, length, and not before min_tokens; the others of the batch go on."""
    (free,) = one.generate(prompts(1), SamplingParams(seed=0, **PARAMS))
    ids, text = free.outputs[0].token_ids, free.outputs[0].text
    assert len(text) > 10
    changes = [
        {"stop": text[5:7]},
        {"stop": text[8:10], "include_stop_str_in_output": True},
        {"stop_token_ids": [ids[6]]},
        {"stop_token_ids": [ids[6]], "min_tokens": 9},
        {"max_tokens": 10},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5},
        {},
    ]
    params = [SamplingParams(**{"seed": 0, **PARAMS, **change}) for change in changes]
    expected, outputs = (llm.generate(prompts(1) * len(params), params) for llm in (one, ahead))
    check_same(outputs, expected)
    got = answers(outputs)
    assert [answer.finish_reason for answer in got] == ["stop"] * 3 + [got[3].finish_reason] + ["length"] * 3
    assert len(got[2].token_ids) == ids.index(ids[6]) + 1 and len(got[3].token_ids) >= 9
    check_nothing_left(ahead)


def test_tokens_that_nobody_looks_at_are_taken_together():
    """Without texts and log probabilities: ids, reasons and reuse are those of single steps, wherever answers end."""
    plain = small_model()
    given = [random_prompt(20 + i, seed=i) for i in range(8)]
    how = {"temperature": 1.1, "ignore_eos": True}
    outputs = []
    for steps in (1, STEPS):
        with checked(small_llm(plain, steps=steps)) as llm:
            (free,) = llm.generate(given[:1], SamplingParams(seed=0, max_tokens=40, **how))
            ids = free.outputs[0].token_ids
            params = [SamplingParams(seed=i, max_tokens=count, **how) for i, count in enumerate((1, 2, 6, 7, 33, 80))]
            params += [SamplingParams(seed=0, max_tokens=40, stop_token_ids=[ids[place]], **how) for place in (6, 22)]
            first = llm.generate([*given[:6], given[0], given[0]], params)
            again = llm.generate([[*given[4], *answers(first)[4].token_ids, 5]], SamplingParams(max_tokens=9, **how))
            outputs.append([answers([free]), answers(first), answers(again), llm.stats().reuse_found])
            check_nothing_left(llm)
    assert outputs[0] == outputs[1]
    assert [answer.finish_reason for answer in outputs[1][1]] == ["length"] * 6 + ["stop"] * 2


def test_logits_that_are_no_numbers_end_their_request_in_the_middle_of_a_launch(one, ahead):
    """The poisoned token is chosen somewhere on the way, and the logits after it are NaN."""
    params = [SamplingParams(seed=i, **{**PARAMS, "logit_bias": {POISON: float(i % 3)}}) for i in range(7)]
    for llm in (one, ahead):
        with pytest.warns(UserWarning, match="requests failed, the first: the logits after token"):
            outputs = llm.generate(prompts(7), params)
        ends = [(answer.token_ids, answer.finish_reason) for answer in answers(outputs)]
        if llm is one:
            expected = ends
    assert ends == expected
    failed = [len(ids) % STEPS for ids, reason in ends if reason == "error"]
    assert 0 < len(failed) < 7 and set(failed) != {1}  # some in the middle
    assert all(isinstance(output.error, NonFiniteLogitsError) for output in outputs if output.error is not None)
    check_nothing_left(ahead)
    assert all(bool(jnp.isfinite(pool).all()) for pool in jax.tree.leaves(ahead._core.runner.pool.caches))


def test_a_client_that_leaves_between_launches_changes_nothing_for_others(one, ahead):
    params = SamplingParams(seed=3, **PARAMS)

    async def leave():
        async for output in ahead.generate_async(prompts(2)[1], params):
            if len(output.outputs[0].token_ids) > 4:
                break

    async def both():
        return await asyncio.gather(leave(), asyncio.to_thread(ahead.generate, prompts(1), params))

    before = ahead.stats()
    _, outputs = asyncio.run(both())
    after = ahead.stats()
    # An explicit number holds for streams, too. Counted here, since a slow listener gets several launches at once.
    steps = sum(after.steps.values()) - sum(before.steps.values())
    assert steps > 2 * (after.launches - before.launches)
    check_same(outputs, one.generate(prompts(1), params))
    check_nothing_left(ahead)


def test_by_itself_the_engine_runs_ahead_on_a_gpu_and_not_while_somebody_streams(ahead, monkeypatch):
    assert [DecodeConfig().steps_on(platform) for platform in ("gpu", "cpu")] == [16, 1]
    monkeypatch.setattr(ahead._core, "_run_ahead", RunAhead(STEPS, while_streaming=False))
    before = ahead.stats()

    async def lengths():
        params = SamplingParams(seed=3, **PARAMS)
        return [len(o.outputs[0].token_ids) async for o in ahead.generate_async(prompts(1)[0], params)]

    seen = asyncio.run(lengths())
    assert seen[-1] == 23
    after = ahead.stats()
    assert sum(after.steps.values()) - sum(before.steps.values()) == after.launches - before.launches
    ahead.generate(prompts(1), SamplingParams(seed=3, **PARAMS), use_tqdm=False)
    alone = ahead.stats()
    assert sum(alone.steps.values()) - sum(after.steps.values()) > 2 * (alone.launches - after.launches)


@pytest.mark.parametrize("steps", [0, 257, 2.5, "most", True])
def test_steps_per_launch_are_checked(steps):
    with pytest.raises(ValueError, match=r"steps_per_launch = .*: must be an integer within 1..256, or 'auto'"):
        DecodeConfig(steps_per_launch=steps)


def test_the_pools_stay_in_place_through_the_loop(ahead, model):
    """Of the compiled loop of one executable that the tests above ran: no copy as large as a pool."""
    runner, lowered = ahead._core.runner, []
    run = runner._decode

    def lower(*args, **static):
        lowered.append(run.lower(*args, **static))
        return run(*args, **static)

    runner._decode = lower
    try:
        ahead.generate(prompts(1), SamplingParams(seed=0, **PARAMS))
    finally:
        runner._decode = run
    text = lowered[0].compile().as_text()
    caches = runner.pool.caches
    for pool in jax.tree.leaves(caches):
        shape = f"f32[{','.join(map(str, pool.shape))}]"
        assert shape in text
        assert not [line for line in text.splitlines() if shape in line and " copy(" in line]


def test_a_warm_up_compiles_the_loop_that_serving_runs(ahead):
    """The tests above have run one; the warm-up finds it compiled."""
    ahead.generate(prompts(1), SamplingParams(seed=0, **PARAMS))
    runner = ahead._core.runner
    runner.warm_up("decode", 8, 8, 32, loops=())
    before = compilations()
    runner.warm_up("decode", 8, 8, 32, loops=(EVERYTHING,))
    assert compilations() == before


@pytest.mark.parametrize("rows", [2, 3])
def test_a_loop_that_xla_refuses_to_put_in_a_graph_runs_without(rows):
    """At once, or after other shapes were in graphs."""
    made = []

    def make(options):
        made.append(options)

        def run(donated):
            if options is not None and donated.shape[0] >= rows:
                raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such option: WHILE\nmore")
            return donated + 1

        return run

    loop = GraphedLoop(make, graphs=True)
    for count in (2, 3, 2, 3):
        assert loop(jnp.ones(count)).tolist() == [2] * count
    assert made == [LOOPS_IN_GRAPHS, None] and loop.refusal == "INVALID_ARGUMENT: no such option: WHILE"


def test_a_loop_that_fails_without_its_graph_too_keeps_it():
    def fail(donated):
        raise jax.errors.JaxRuntimeError("INTERNAL: an earlier step failed")

    runs = [fail, fail]
    loop = GraphedLoop(lambda options: lambda donated: (runs.pop() if runs else jnp.negative)(donated), graphs=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="an earlier step failed"):
        loop(jnp.ones(2))
    assert loop.refusal is None and loop(jnp.ones(2)).tolist() == [-1, -1]


def test_a_loop_that_runs_out_of_memory_keeps_its_graph():
    def run(donated):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    loop = GraphedLoop(lambda options: run, graphs=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        loop(jnp.ones(2))
    assert loop.refusal is None
