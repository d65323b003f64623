"""`LLM` as users see it: outputs, log probabilities, stopping, chat, arguments."""

import asyncio
import itertools

import jax
import numpy as np
import pytest
from serving import small_llm
from small_models import random_prompt, small_model

from minimax_jax import LLM, SamplingParams
from minimax_jax.engine import outputs
from minimax_jax.engine.build import _batch_sizes, _wide_tables
from minimax_jax.engine.runner_config import RunnerConfig
from minimax_jax.engine.sequence_text import SequenceText
from minimax_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny():
    shapes = {"segment_config": {"buckets": [64], "enabled": False}, "decode_config": {"batch_sizes": [4]}}
    cache = {"max_tokens": 16 * 128}
    with LLM("tiny", max_batch_size=4, max_num_tokens=64, max_seq_len=384, cache_config=cache, **shapes) as llm:
        yield llm


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def llm(model):
    with small_llm(model) as shared:
        yield shared


def test_one_text_and_many(tiny):
    params = SamplingParams(temperature=0, max_tokens=8)
    (one,) = tiny.generate("In the beginning", params)
    many = tiny.generate(["In the beginning", one.prompt_token_ids, "And it"], params)
    assert one.prompt == "In the beginning" and one.prompt_token_ids[0] == tiny.model.config.bos_token_id
    assert many[0].outputs == many[1].outputs == one.outputs and many[1].prompt is None
    answer = one.outputs[0]
    assert answer.text == tiny.tokenizer.decode(answer.token_ids) and len(answer.token_ids) == 8
    assert (answer.finish_reason, answer.stop_reason, answer.logprobs, one.finished) == ("length", None, None, True)
    assert tiny.generate([]) == []


def test_the_checkpoints_own_defaults(tiny):
    params = tiny.default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.8, 0.95, 40, 256)


def test_stop_strings_cut_the_text_and_stop_ids_end_it(tiny):
    greedy = {"temperature": 0, "max_tokens": 12}
    (free,) = tiny.generate("In the beginning", SamplingParams(**greedy))
    text = free.outputs[0].text
    stop = text[9:13]
    params = [
        SamplingParams(**greedy, stop=stop),
        SamplingParams(**greedy, stop=["never", stop], include_stop_str_in_output=True),
        SamplingParams(**greedy, stop_token_ids=[free.outputs[0].token_ids[-1]]),
        SamplingParams(**greedy, stop=stop, min_tokens=11),
    ]
    cut, kept, by_id, late = (o.outputs[0] for o in tiny.generate(["In the beginning"] * 4, params))
    at = text.index(stop)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[:at], "stop", stop)
    assert kept.text == text[: at + len(stop)]
    ids = free.outputs[0].token_ids
    assert by_id.stop_reason == ids[-1] and by_id.token_ids == ids[: ids.index(ids[-1]) + 1]
    assert by_id.text == tiny.tokenizer.decode(by_id.token_ids[:-1])
    assert len(late.token_ids) >= 11


def test_a_stream_grows_and_never_shows_half_a_stop_string(tiny):
    async def listen(params):
        return [output async for output in tiny.generate_async("In the beginning", params)]

    (free,) = tiny.generate("In the beginning", SamplingParams(temperature=0, max_tokens=12))
    stop = free.outputs[0].text[9:14]
    outputs = asyncio.run(listen(SamplingParams(temperature=0, max_tokens=12, stop=stop)))
    texts = [output.outputs[0].text for output in outputs]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert outputs[-1].finished and not any(output.finished for output in outputs[:-1])
    assert all(free.outputs[0].text.partition(stop)[0].startswith(text) for text in texts)
    with pytest.raises(ValueError, match="the prompt has 400 tokens: must be at most 383"):
        asyncio.run(anext_of(tiny.generate_async([1] * 400)))


def test_a_stream_looks_at_each_token_once_and_its_outputs_stay_as_they_were(llm, monkeypatch):
    looked, look = [], outputs._logprobs
    monkeypatch.setattr(outputs, "_logprobs", lambda *args: looked.append(1) or look(*args))

    async def listen():
        params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=1)
        return [output.outputs[0] async for output in llm.generate_async(random_prompt(9), params)]

    seen = asyncio.run(listen())
    assert len(looked) == 12 + 8
    for answer in seen:
        count = len(answer.token_ids)
        assert answer.token_ids == seen[-1].token_ids[:count] and answer.logprobs == seen[-1].logprobs[:count]
    assert [len(answer.token_ids) for answer in seen] == sorted({len(answer.token_ids) for answer in seen})


async def anext_of(stream):
    return await anext(stream)


def test_log_probabilities_equal_those_of_the_full_forward(llm, model):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2)
    prompt = random_prompt(100)
    output = llm.generate([prompt], params)[0]
    answer = output.outputs[0]
    ids = prompt + answer.token_ids
    logs = np.asarray(jax.nn.log_softmax(model([ids]).logits[0]))
    given = [*output.prompt_logprobs, *answer.logprobs]
    assert len(given) == len(ids) and given[0] is None
    for place in range(1, len(ids)):
        row, most = logs[place - 1], 2 if place < len(prompt) else 3
        best = np.argsort(-row, kind="stable")[:most]
        assert set(best) <= set(given[place]) <= {*best, ids[place]}
        own = given[place][ids[place]]
        assert own.logprob == pytest.approx(row[ids[place]], abs=1e-3)
        assert own.rank == (row > row[ids[place]]).sum() + 1 and own.decoded_token is None
    assert answer.cumulative_logprob == pytest.approx(
        sum(logs[99 + i, t] for i, t in enumerate(answer.token_ids)), abs=1e-3
    )
    assert llm.generate([prompt], params)[0].prompt_logprobs == output.prompt_logprobs  # computed again, not found


def test_penalties_and_biases_do_what_they_say(llm):
    prompt = random_prompt(30)
    free = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].token_ids
    cases = [
        SamplingParams(temperature=0, max_tokens=12, logit_bias={free[0]: -100}),
        SamplingParams(temperature=0, max_tokens=12, logit_bias={7: 100}),
        SamplingParams(temperature=0, max_tokens=12, presence_penalty=2, frequency_penalty=2, repetition_penalty=1e6),
        SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[free[0], free[1]], min_tokens=6),
    ]
    banned, forced, varied, late = (o.outputs[0].token_ids for o in llm.generate([prompt] * 4, cases))
    assert free[0] not in banned and forced == [7] * 12
    assert len(set(varied)) == 12 and not set(varied) & set(prompt)
    assert len(late) >= 6 and not {free[0], free[1]} & set(late[:6])


def test_a_conversation_goes_through_the_template(tiny):
    messages = [{"role": "user", "content": "Hi"}]
    params = SamplingParams(temperature=0, max_tokens=3)
    one = tiny.chat(messages, params, thinking_mode="disabled")
    two = tiny.chat([messages, messages], params, thinking_mode="disabled")
    text = tiny.tokenizer.apply_chat_template(messages, thinking_mode="disabled", tokenize=False)
    assert one[0].prompt == text and one[0].prompt_token_ids == tiny.tokenizer.encode(text)
    assert [o.outputs for o in two] == [one[0].outputs] * 2
    own = [{"temperature": 0, "max_tokens": count} for count in (1, 2)]
    each = tiny.chat([messages, messages], [SamplingParams(**how) for how in own], thinking_mode="disabled")
    assert [o.outputs[0].token_ids for o in each] == [one[0].outputs[0].token_ids[:count] for count in (1, 2)]
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    (called,) = tiny.chat(messages, SamplingParams(temperature=0, max_tokens=1), tools=tools)
    assert called.prompt == tiny.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) != text
    assert '"f"' in called.prompt and called.error is None
    with pytest.raises(ValueError, match=r"messages\[0\].role"):
        tiny.chat([{"role": "nobody", "content": "x"}], params)


def test_stop_strings_over_every_cut_of_the_text():
    tokenizer = Tokenizer.from_pretrained("tiny")
    text = "one two three éé four"
    ids = tokenizer.encode(text)
    for stop, kept in (("two", False), (" t", True), ("éé f", False), ("zzz", False)):
        grown = SequenceText(tokenizer, [stop], keep_stop=kept)
        found = next((s for s in map(grown.push, ids) if s), None) or grown.finish()
        before, hit, _ = text.partition(stop)
        assert (found or "") == hit and grown.text == before + (hit if kept else "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n = 0: must be an integer within 1..64"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"min_tokens": 17}, "min_tokens = 17: must be an integer within 0..max_tokens"),
        ({"temperature": -1}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0}, r"top_p = 0: must be a number in \(0, 1\]"),
        ({"top_k": -2}, "top_k = -2"),
        ({"min_p": 1.5}, "min_p = 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"presence_penalty": 3}, "presence_penalty = 3"),
        ({"logit_bias": {-1: 2}}, "logit_bias = "),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"stop": [""]}, "stop = "),
        ({"stop": "x", "detokenize": False}, "stop = .*: must be empty without detokenize"),
        ({"logprobs": 21}, "logprobs = 21"),
        ({"max_tokens": 2**40}, "max_tokens = 1099511627776: must be an integer within 1..2147483647, or None"),
        ({"temperature": 1e39}, r"temperature = 1e\+39: must be a number >= 0"),  # infinite as float32
        ({"repetition_penalty": 1e-50}, "repetition_penalty = 1e-50: must be a number > 0, at least 1e-37"),  # 0 there
        ({"stop": 5}, "stop = 5: must be a string or strings"),
        ({"stop_token_ids": 5}, "stop_token_ids = 5: must be token ids"),
        ({"logit_bias": [1]}, r"logit_bias = \[1\]: must be a dict of token ids"),
        ({"ignore_eos": "no"}, "ignore_eos = 'no': must be True or False"),
        ({"max_tokens": True}, "max_tokens = True: must be an integer within 1..2147483647, or None"),
    ],
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size = 0: must be an integer >= 1"),
        ({"max_num_tokens": 3}, "max_num_tokens = 3: must be at least max_batch_size = 8"),
        ({"max_seq_len": 513}, r"max_seq_len = 513: must be within 2..512"),
        ({"cache_config": {"page_size": 128}}, "cache_config: page_size = 128: must be 16, the model's sparse block"),
        ({"cache_config": {"pages": 3}}, "cache_config has 'pages': must be of free_memory_fraction, max_tokens"),
        (
            {"cache_config": {"free_memory_fraction": 0}},
            "cache_config: free_memory_fraction = 0: must be a number within",
        ),
        ({"segment_config": {"buckets": (32,)}}, "segment_config: buckets end at 32: must reach max_num_tokens = 64"),
        (
            {"decode_config": {"batch_sizes": [0]}},
            r"decode_config: batch_sizes = \[0\]: must be a list of integers >= 1",
        ),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: must be 1 for a loaded model"),
        ({"dtype": "bfloat16"}, "dtype = 'bfloat16': must be 'auto' for a loaded model, which has its own"),
        ({"quantization": "none"}, "quantization = 'none': must be 'auto' for a loaded model, which has its own"),
        ({"enable_attention_dp": "no"}, "enable_attention_dp = 'no': must be True or False"),
        ({"parallel": "x"}, "parallel = 'x': must be a ParallelConfig or None"),
        ({"max_seq_len": 100.5}, "max_seq_len = 100.5: must be an integer >= 0"),
        ({"seed": -1}, "seed = -1: must be an integer >= 0"),
        ({"max_batch_size": True}, "max_batch_size = True: must be an integer >= 1"),
        ({"max_num_tokens": np.float32(64)}, r"max_num_tokens = np.float32\(64.0\): must be an integer >= 1"),
        ({"max_seq_len": np.bool_(True)}, "max_seq_len = np.True_: must be an integer >= 0"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size = '2': must be an integer >= 1"),
        ({"moe_expert_parallel_size": False}, "moe_expert_parallel_size = False: must be an integer >= 1"),
        ({"cache_config": {"page_size": True}}, "cache_config: page_size = True: must be an integer >= 1"),
        ({"segment_config": {"buckets": np.ones(2)}}, "segment_config: buckets = .* must be a list of integers >= 1"),
        ({"segment_config": {"buckets": np.array(64)}}, "segment_config: buckets = .* must be a list of integers >= 1"),
        ({"decode_config": {"steps_per_launch": np.array([1, 2])}}, "decode_config: steps_per_launch = array"),
        ({"cache_config": {"enable_reuse": 1}}, "cache_config: enable_reuse = 1: must be True or False"),
        ({"decode_config": {"graph_loops": "no"}}, "decode_config: graph_loops = 'no': must be True or False"),
    ],
)
def test_settings_that_do_not_fit_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        small_llm(model, **options)


@pytest.mark.parametrize("kind", [np.int16, np.int64])
def test_integers_may_be_numpys(model, kind):
    sizes = {name: kind(value) for name, value in {"max_batch_size": 8, "max_num_tokens": 64, "seed": 3}.items()}
    ranks = {"tensor_parallel_size": kind(1), "moe_expert_parallel_size": kind(1)}
    configs = {
        "cache_config": {"page_size": kind(16), "max_tokens": kind(640), "free_memory_fraction": np.float32(0.5)},
        "segment_config": {"buckets": np.array([64, 32], kind), "enabled": False},
        "decode_config": {"batch_sizes": [kind(8)], "page_buckets": (kind(32),), "steps_per_launch": kind(1)},
    }
    plain = {
        "cache_config": {"max_tokens": 640, "page_size": 16},
        "segment_config": {"buckets": (64, 32), "enabled": False},
    }
    params, outputs = SamplingParams(temperature=0, max_tokens=np.uint8(9), seed=np.uint8(1)), []
    for options in ({**sizes, **ranks, **configs, "max_seq_len": kind(400)}, {**plain, "seed": 3, "max_seq_len": 400}):
        with small_llm(model, **options) as engine:
            assert type(engine.max_seq_len) is int and engine.max_seq_len == 400
            outputs.append(engine.generate([random_prompt(300)], params)[0].outputs)
    assert outputs[0] == outputs[1] and len(outputs[0][0].token_ids) == 9


def test_parameters_that_are_numpys_integers_become_pythons():
    """Which do not overflow when a narrow one meets the length of a prompt."""
    given = {"n": 2, "max_tokens": 9, "top_k": 5, "logprobs": 1, "prompt_logprobs": 3, "min_tokens": 2, "seed": 7}
    params = SamplingParams(
        **{name: np.uint8(value) for name, value in given.items()}, logit_bias={np.uint8(3): 1.0},
        stop_token_ids=np.array([5, 6], np.uint8),
    )  # fmt: skip
    assert repr(params) == repr(SamplingParams(**given, logit_bias={3: 1.0}, stop_token_ids=[5, 6]))


@pytest.mark.parametrize("prompts", [5, None, {"prompt": "x"}])
def test_what_is_no_prompt_is_named(llm, prompts):
    with pytest.raises(TypeError, match="prompts: must be texts or lists of token ids, one or many, got "):
        llm.generate(prompts)


def test_stop_ids_may_be_an_array():
    assert SamplingParams(stop_token_ids=np.array([1, 2])).stop_token_ids == (1, 2)


def test_parameters_must_be_as_many_as_prompts(llm):
    with pytest.raises(ValueError, match="sampling_params: must be one SamplingParams, or 2"):
        llm.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        llm.generate("text")


def test_answers_end_where_the_room_does(model):
    with small_llm(model, pages=4) as small:
        assert small.max_seq_len == 64
    with small_llm(model, max_seq_len=64) as small:
        output = small.generate([random_prompt(60)], SamplingParams(max_tokens=None, ignore_eos=True))[0]
        assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].finish_reason == "length"


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_read(llm, monkeypatch):
    runner, events = llm._core.runner, []
    launch, fetch = runner.launch, runner.fetch

    def launching(plans):
        step = launch(plans)
        events.append(("launch", id(step), step))
        return step

    def fetching(step):
        events.append(("fetch", id(step), step))
        return fetch(step)

    monkeypatch.setattr(runner, "launch", launching)
    monkeypatch.setattr(runner, "fetch", fetching)
    llm.generate([random_prompt(9)], SamplingParams(temperature=0, max_tokens=5))
    names = [name for name, _, _ in events]
    assert names == ["launch", "launch", "fetch", "launch", "fetch", "launch", "fetch", "launch", "fetch", "fetch"]
    order = [number for _, number, _ in events]
    assert order[0] == order[2] and order[1] == order[4]  # one step late


def test_few_shapes_are_compiled():
    config = RunnerConfig(48, batch_sizes=_batch_sizes(48), token_buckets=(64, 256), page_buckets=_wide_tables(100))
    assert config.batch_sizes == (1, 2, 4, 8, 16, 32, 48) and config.page_buckets == (8, 32, 100)
    assert [config.mixed_rows(n) for n in (1, 8, 9, 48)] == [8, 8, 48, 48]
    assert (config.rows(9), config.tokens(65), config.pages(33)) == (16, 256, 100)
    assert _batch_sizes(1) == (1,) and _wide_tables(5) == (5,)
