"""What goes wrong ends its own request, says so, and leaves the others alone."""

import asyncio
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import check_nothing_left, checked, small_llm
from small_models import VOCAB, random_prompt, small_model

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.engine.errors import DeviceStepError, EngineClosedError, NonFiniteLogitsError
from minimax_jax.engine.sampling_params import SamplingParams

POISON = 90
GREEDY = SamplingParams(temperature=0, max_tokens=6)
LONG = SamplingParams(max_tokens=400, logit_bias={POISON: -100})


@pytest.fixture(scope="module")
def model():
    """A token's embedding is NaN: whoever sees it has no finite logits."""
    whole = small_model()
    state = whole.state()
    state["embed_tokens"] = state["embed_tokens"].at[POISON].set(jnp.nan)
    return MiniMaxM3ForCausalLM(whole.config, state)


@pytest.fixture(scope="module")
def llm(model):
    with checked(small_llm(model)) as shared:
        yield shared


def clean_prompt(length, seed):
    return [token % POISON for token in random_prompt(length, seed)]


def tokens(output):
    return output.outputs[0].token_ids


def test_bad_requests_end_with_their_error_and_no_other(llm):
    good = [clean_prompt(20, 1), clean_prompt(33, 2)]
    expected = [tokens(output) for output in llm.generate(good, GREEDY)]
    bad = [[1] * 512, [], [1, VOCAB], [1, -1], clean_prompt(40, 3)]
    params = [GREEDY] * 6 + [SamplingParams(logit_bias={VOCAB: 1.0}), GREEDY]
    bad[4][7] = POISON
    with pytest.warns(UserWarning, match="6 of 8 requests failed, the first: the prompt has 512 tokens"):
        outputs = llm.generate([good[0], *bad[:4], good[1], clean_prompt(5, 4), [0.5]], params)
    assert [tokens(outputs[0]), tokens(outputs[5])] == expected
    messages = [str(output.error) for output in outputs]
    assert "must be at most 511" in messages[1] and "the prompt is empty" in messages[2]
    assert f"prompt[1] = {VOCAB}: must be a token id within 0..{VOCAB - 1}" in messages[3]
    assert (
        "a text or a list of token ids" in messages[7]
        and "prompt[1] = -1" in messages[4]
        and f"logit_bias has token id {VOCAB}" in messages[6]
    )
    assert all(output.finished for output in outputs)
    check_nothing_left(llm)


@pytest.mark.parametrize("place", [0, 35])
def test_logits_that_are_no_numbers_end_the_request_and_its_pages_are_clean(llm, place):
    good, bad = [clean_prompt(20, 1), clean_prompt(200, 5)], clean_prompt(40, 3)
    expected = [tokens(output) for output in llm.generate(good, GREEDY)]
    bad[place] = POISON
    with pytest.warns(UserWarning, match="1 of 3 requests failed"):
        outputs = llm.generate([good[0], bad, good[1]], GREEDY)
    assert isinstance(outputs[1].error, NonFiniteLogitsError) and "not finite" in str(outputs[1].error)
    assert outputs[1].outputs[0].finish_reason == "error" and tokens(outputs[1]) == []
    assert [tokens(outputs[0]), tokens(outputs[2])] == expected
    check_nothing_left(llm)
    assert all(bool(jnp.isfinite(pool).all()) for pool in jax.tree.leaves(llm._core.runner.pool.caches))
    with pytest.warns(UserWarning, match="failed"):  # nothing of it is found again
        assert llm.generate([bad], GREEDY)[0].num_cached_tokens == 0


def failing(function, at, consumes):
    """`function`, whose call number `at` runs out of memory, with or without having taken its caches."""
    calls = []

    def run(leaves, caches, *rest):
        calls.append(1)
        if len(calls) == at:
            if consumes:
                for pool in jax.tree.leaves(caches):
                    pool.delete()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 999 bytes.\nmore")
        return function(leaves, caches, *rest)

    return run


@pytest.mark.parametrize(("at", "consumes", "culprit"), [(1, False, 150), (3, True, 150), (5, False, 12)])
def test_a_device_without_memory_ends_the_largest_request_of_the_step(llm, monkeypatch, at, consumes, culprit):
    prompts = [clean_prompt(n, 100 * at + n) for n in (9, 150, 12)]
    params = [
        GREEDY,
        SamplingParams(temperature=0, max_tokens=3),
        SamplingParams(seed=3, max_tokens=8, logit_bias={POISON: -100}),
    ]
    monkeypatch.setattr(llm.model.steps, "layers", failing(llm.model.steps.layers, at, consumes))
    before = llm.stats().failed_steps
    with pytest.warns(UserWarning, match="1 of 3 requests failed, the first: the device failed a step of"):
        outputs = llm.generate(prompts, params)
    failed = [output for output in outputs if output.error is not None]
    assert [len(output.prompt_token_ids) for output in failed] == [culprit]
    assert llm.stats().failed_steps == before + 1
    assert isinstance(failed[0].error, DeviceStepError) and "RESOURCE_EXHAUSTED" in str(failed[0].error)
    monkeypatch.undo()
    for output, own in zip(outputs, llm.generate(prompts, params), strict=True):
        assert output.error is not None or tokens(output) == tokens(own)
    check_nothing_left(llm)


def test_a_client_that_goes_away_frees_its_pages(llm):
    async def leave():
        async for output in llm.generate_async(clean_prompt(30, 1), LONG):
            if len(tokens(output)) > 2:
                break

    async def cancelled():
        task = asyncio.create_task(leave_never())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def leave_never():
        async for _ in llm.generate_async(clean_prompt(30, 2), LONG):
            pass

    for client in (leave, cancelled):
        asyncio.run(client())
        check_nothing_left(llm)


def test_a_listener_that_fails_ends_its_request_alone(llm):
    def listen(_):
        raise BrokenPipeError

    request = llm._request(clean_prompt(10, 1), LONG)
    llm._thread.submit([request], listen)
    output = llm.generate([clean_prompt(20, 1)], GREEDY)[0]
    assert len(tokens(output)) == 6
    check_nothing_left(llm)
    assert request.sequences[0].finish_reason == "abort"


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_what_runs_and_the_next_call_works(llm):
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([clean_prompt(20, i) for i in range(300)], LONG)
    check_nothing_left(llm)
    assert len(tokens(llm.generate([clean_prompt(20, 1)], GREEDY)[0])) == 6


def close_once_it_works(llm):
    while not llm.stats().new_tokens:
        time.sleep(0.01)
    llm.close()


def test_a_closed_engine_says_so_and_frees_its_pages(model):
    llm = small_llm(model)
    pools = jax.tree.leaves(llm._core.runner.pool.caches)
    closing = threading.Thread(target=close_once_it_works, args=(llm,))
    closing.start()
    with pytest.warns(UserWarning, match="the engine was closed before this request was done"):
        output = llm.generate([clean_prompt(9, 1)], LONG)[0]
    closing.join()
    assert isinstance(output.error, EngineClosedError) and output.outputs[0].finish_reason == "abort"
    llm.close()
    assert all(pool.is_deleted() for pool in pools)
    with pytest.raises(EngineClosedError, match="closed: make a new LLM"):
        llm.generate([[1]], GREEDY)


def test_an_engine_that_dies_tells_every_caller(model, monkeypatch):
    with small_llm(model) as llm:
        monkeypatch.setattr(llm._core.runner, "launch", lambda plans: np.zeros(1)[5])
        with pytest.warns(UserWarning, match="the engine died: index 5 is out of bounds"):
            outputs = llm.generate([[1, 2], [3]], GREEDY)
        assert all(isinstance(output.error, EngineClosedError) for output in outputs)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 2
        with pytest.raises(EngineClosedError, match="the engine died: index 5"):
            llm.generate([[1]], GREEDY)
