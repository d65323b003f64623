"""Engines over small models that the tests of serving share, and what they ask of them."""

import dataclasses
import time

import numpy as np
from small_models import VOCAB

from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.llm import LLM

PAGE = 16


def small_llm(model, *, pages=64, reuse=True, enabled=False, steps="auto", **options) -> LLM:
    """One shape for decoding and one for mixed steps, so that nothing is compiled twice."""
    given = {
        "max_batch_size": 8,
        "max_num_tokens": 64,
        "cache_config": {"page_size": PAGE, "max_tokens": pages * PAGE, "enable_reuse": reuse},
        "segment_config": {"buckets": (64,), "enabled": enabled},
        "decode_config": {"batch_sizes": (8,), "page_buckets": (32,), "steps_per_launch": steps},
    }
    return LLM(model, **{**given, **options})


def random_params(random, index) -> SamplingParams:
    """Everything that a request can ask for, mixed."""
    options = {"max_tokens": int(random.integers(1, 20)), "seed": index}
    if random.random() < 0.4:
        return SamplingParams(temperature=0, **options)
    options |= {"temperature": float(random.uniform(0.5, 1.5))}
    choices = [
        {"top_k": int(random.integers(1, 20))},
        {"top_p": float(random.uniform(0.3, 1))},
        {"min_p": float(random.uniform(0.01, 0.3))},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"logit_bias": {int(random.integers(VOCAB)): 3.0, int(random.integers(VOCAB)): -5.0}},
        {"min_tokens": min(4, options["max_tokens"]), "stop_token_ids": [int(i) for i in random.integers(0, VOCAB, 9)]},
        {},
    ]
    for choice in random.choice(len(choices), 2, replace=False):
        options |= choices[choice]
    return SamplingParams(**options)


def random_requests(count, longest, *, seed=0, vocab=VOCAB):
    """(prompt, params) pairs, many of which begin alike."""
    random = np.random.default_rng(seed)
    common = random.integers(0, vocab, longest).tolist()
    requests = []
    for index in range(count):
        length = int(random.integers(1, longest)) if random.random() < 0.5 else int(random.integers(1, 20))
        shared = int(random.integers(0, length)) if random.random() < 0.5 else 0
        prompt = common[:shared] + random.integers(0, vocab, length - shared).tolist()
        params = random_params(random, index)
        if index % 5 == 1:
            params = dataclasses.replace(params, logprobs=index % 4, prompt_logprobs=1 if index % 2 else None)
        requests.append((prompt, params))
    return requests


def check_log_probabilities(output, prompt, params) -> None:
    """Each token has its own, and those of as many others as were asked for."""
    (answer,) = output.outputs
    assert (answer.logprobs is None, output.prompt_logprobs is None) == (
        params.logprobs is None,
        params.prompt_logprobs is None,
    )
    for most, tokens, given in (
        (params.logprobs, answer.token_ids, answer.logprobs),
        (params.prompt_logprobs, prompt[1:], (output.prompt_logprobs or [None])[1:]),
    ):
        if most is not None:
            assert len(given) == len(tokens)
            for token, found in zip(tokens, given, strict=True):
                assert most <= len(found) <= most + 1 and found[token].logprob <= 0


def checked(llm: LLM) -> LLM:
    """Has the books checked after every step."""
    step = llm._core.step

    def step_and_check():
        touched = step()
        for scheduler in llm._core.schedulers:
            scheduler.check()
        return touched

    llm._core.step = step_and_check
    return llm


def check_nothing_left(llm: LLM) -> None:
    """Once the engine has heard of the last aborts."""
    for _ in range(100):
        if not llm._core.busy:
            break
        time.sleep(0.05)
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)
    for scheduler in llm._core.schedulers:
        scheduler.check()
