"""`generate` and calls as users see them: stopping, streaming, inputs, outputs, errors."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import VOCAB, random_prompt, small_config, small_model

from minimax_jax import GenerationConfig, MiniMaxM3ForCausalLM
from minimax_jax.buckets import bucket
from minimax_jax.engine.prompts import read_prompts


@pytest.fixture(scope="module")
def model():
    return small_model()


class Recorder:
    def __init__(self):
        self.calls, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.calls.append(np.array(value))

    def end(self):
        self.ended += 1


def test_streamer_gets_the_prompt_and_then_every_token(model):
    recorder = Recorder()
    result = np.asarray(model.generate([random_prompt(9)], max_new_tokens=6, streamer=recorder))
    assert recorder.calls[0].tolist() == [random_prompt(9)]
    assert np.concatenate(recorder.calls[1:]).tolist() == result[0, 9:].tolist()
    assert recorder.ended == 1


def test_a_row_stops_at_its_end_token_and_is_padded(model):
    prompts = [random_prompt(10, seed=s) for s in range(4)]
    free = np.asarray(model.generate(prompts, max_new_tokens=16))[:, 10:]
    end = int(free[1, 3])
    stopped = np.asarray(model.generate(prompts, max_new_tokens=16, eos_token_id=end))[:, 10:]
    for row_free, row in zip(free, stopped, strict=True):
        hits = np.flatnonzero(row_free == end)
        length = int(hits[0]) + 1 if hits.size else stopped.shape[1]
        assert row[:length].tolist() == row_free[:length].tolist()
        assert (row[length:] == end).all()
    alone = np.asarray(model.generate([prompts[1]], max_new_tokens=16, eos_token_id=[end]))
    assert alone.shape[1] == 10 + int(np.flatnonzero(free[1] == end)[0]) + 1  # stops early when all rows have


def test_generation_config_gives_the_defaults_and_arguments_win(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.9, top_k=4)
    other = MiniMaxM3ForCausalLM(model.config, model.state(), generation_config=config)
    assert other.generate([random_prompt(4)]).shape == (1, 7)
    assert other.generate([random_prompt(4)], max_new_tokens=5).shape == (1, 9)
    assert other.generate([random_prompt(510)]).shape == (1, 512)  # a default is cut to the room there is
    greedy = np.asarray(model.generate([random_prompt(4)], max_new_tokens=3))
    assert np.array_equal(np.asarray(other.generate([random_prompt(4)], do_sample=False)), greedy)
    assert np.array_equal(np.asarray(other.generate([random_prompt(4)], temperature=0)), greedy)


def test_a_row_samples_by_seed_row_and_position_alone(model):
    prompts = [random_prompt(12, seed=s) for s in range(3)]
    sample = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.5, "seed": 11}
    together = np.asarray(model.generate(prompts, **sample))
    assert np.array_equal(together, np.asarray(model.generate(prompts, **sample)))
    assert np.array_equal(together[:1], np.asarray(model.generate(prompts[:1], **sample)))
    assert np.array_equal(together[:2], np.asarray(model.generate(prompts[:2], **sample)))
    same = np.asarray(model.generate([prompts[0]] * 3, **sample))[:, 12:]
    assert len({tuple(row) for row in same.tolist()}) > 1  # rows of one prompt differ
    assert not np.array_equal(together, np.asarray(model.generate(prompts, **{**sample, "seed": 12})))


def test_inputs_of_every_kind_give_the_same_tokens(model):
    prompt = random_prompt(6)
    expected = np.asarray(model.generate([prompt], max_new_tokens=4)).tolist()
    kinds = (prompt, np.array(prompt), np.array([prompt], np.int64), jax.numpy.array([prompt]), (tuple(prompt),))
    for ids in (*kinds, [np.array(prompt)], [jax.numpy.array(prompt)]):
        result = model.generate(ids, max_new_tokens=4)
        assert isinstance(result, jax.Array) and np.asarray(result).tolist() == expected


def test_torch_in_gives_torch_out(model):
    torch = pytest.importorskip("torch")
    ids = torch.tensor([random_prompt(6)])
    result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert isinstance(result, torch.Tensor) and result.dtype == torch.int64
    assert result.tolist() == np.asarray(model.generate([random_prompt(6)], max_new_tokens=4)).tolist()
    logits = model(ids, torch.ones(1, 6)).logits
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 6, VOCAB) and logits.device == ids.device
    rows = [torch.tensor(random_prompt(6)), torch.tensor(random_prompt(4))]
    assert isinstance(model.generate(rows, max_new_tokens=2), torch.Tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [[]]}, r"input_ids\[0\] is empty"),
        ({"input_ids": [[1, 2], []]}, r"input_ids\[1\] is empty"),
        ({"input_ids": [[1, VOCAB]]}, rf"input_ids\[0\]\[1\] = {VOCAB}: must be within 0..{VOCAB - 1}"),
        ({"input_ids": [[-1, 3]]}, r"input_ids\[0\]\[0\] = -1"),
        ({"input_ids": [[0.5]]}, "must be integers"),
        ({"input_ids": np.zeros((1, 2, 3), int)}, r"must be \[R, L\]"),
        ({"input_ids": [[1] * 513]}, "at most max_position_embeddings = 512"),
        ({"input_ids": [[1] * 512]}, "at least one of max_position_embeddings = 512 to be free"),
        ({"input_ids": [[1] * 500], "max_new_tokens": 13}, "max_new_tokens = 13: at most 12 fit"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\)"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "has a hole"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, r"input_ids\[0\] is empty"),
        ({"input_ids": [[1]], "max_new_tokens": 0}, "max_new_tokens = 0: must be an integer >= 1"),
        ({"input_ids": [[1]], "temperature": -1.0}, "temperature = -1.0"),
        ({"input_ids": [[1]], "top_p": 0.0}, "top_p = 0.0"),
        ({"input_ids": [[1]], "top_k": -2}, "top_k = -2"),
        ({"input_ids": [[1]], "top_k": 2**40}, "top_k = 1099511627776"),
        ({"input_ids": [[1]], "seed": 2**32}, "seed = 4294967296"),
        ({"input_ids": [[1]], "seed": -1}, "seed = -1"),
        ({"input_ids": [[1]], "eos_token_id": VOCAB}, f"eos_token_id = {VOCAB}: must be within"),
        ({"input_ids": [[5], [6, 7], 8]}, "input_ids mixes ids and prompts"),
        ({"input_ids": [[5], [[6]]]}, r"input_ids\[1\] has shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "attention_mask holds other values"),
        ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1, 0]]}, "prompts of different lengths"),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_generation_fills_the_context_to_the_last_position(model):
    result = np.asarray(model.generate([random_prompt(505)], max_new_tokens=7))
    assert result.shape == (1, 512)


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=5), st.booleans())
def test_prompts_survive_padding_on_either_side(prompts, left):
    width = max(map(len, prompts)) + 2
    ids = np.full((len(prompts), width), VOCAB + 5)  # what stands under the mask is never looked at
    mask = np.zeros((len(prompts), width), int)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    read = read_prompts(ids, mask, vocab_size=VOCAB, max_len=100)
    assert [tokens.tolist() for tokens in read.tokens] == prompts
    assert read.padded[read.kept].tolist() == [token for prompt in prompts for token in prompt]
    assert [tokens.tolist() for tokens in read_prompts(prompts, None, vocab_size=VOCAB, max_len=100).tokens] == prompts


@given(st.integers(1, 5000), st.integers(1, 64))
def test_buckets_hold_their_size_and_are_few(size, least):
    assert max(size, least) <= bucket(size, least) < 2 * max(size, least)
    assert bucket(bucket(size, least), least) == bucket(size, least)


def test_bad_generation_config_files_name_the_file(tmp_path):
    assert GenerationConfig.from_pretrained(tmp_path, (5,)).eos_token_id == (5,)
    path = tmp_path / "generation_config.json"
    for content, message in (("{", "not valid JSON"), ("[]", "JSON object"), ('{"top_p": 2}', r"top_p = 2")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"generation_config.json: .*{message}"):
            GenerationConfig.from_pretrained(tmp_path)
    path.write_text('{"eos_token_id": 7, "top_p": 0.9, "temperature": 0.5, "transformers_version": "5"}')
    read = GenerationConfig.from_pretrained(tmp_path, (5,))
    assert (read.eos_token_id, read.top_p, read.temperature) == ((7,), 0.9, 0.5)
    read.write(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == read


def test_the_prompt_comes_back_as_it_was_given(model):
    ids, mask = np.array([[90, 90, 5, 6]]), np.array([[0, 0, 1, 1]])
    assert np.asarray(model.generate(ids, mask, max_new_tokens=2))[0, :4].tolist() == [90, 90, 5, 6]
    ragged = np.asarray(model.generate([[5, 6], [7, 8, 9]], max_new_tokens=2, eos_token_id=77))
    assert ragged[0, :3].tolist() == [5, 6, 77] and ragged[1, :3].tolist() == [7, 8, 9]


def test_the_streamer_is_ended_when_a_step_fails(model, monkeypatch):
    class Failing(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.calls) == 3:
                raise KeyboardInterrupt

    failing = Failing()
    with pytest.raises(KeyboardInterrupt):
        model.generate([random_prompt(9)], max_new_tokens=6, streamer=failing)
    assert failing.ended == 1


def test_options_may_be_numpy_scalars_and_arrays(model):
    options = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "do_sample": True, "top_k": np.int32(3)}
    expected = {"max_new_tokens": 3, "temperature": 0.5, "do_sample": True, "top_k": 3}
    prompt = [random_prompt(5)]
    got = np.asarray(model.generate(prompt, **options, seed=np.int64(2), eos_token_id=np.array([93, 94])))
    assert np.array_equal(got, np.asarray(model.generate(prompt, **expected, seed=2, eos_token_id=[93, 94])))
    assert GenerationConfig(eos_token_id=(3,)).override(eos_token_id=-1).eos_token_id == ()
    assert GenerationConfig(eos_token_id=(3,)).override(eos_token_id=[-1]).eos_token_id == ()


@pytest.mark.parametrize("options", [{"temperature": 1e-39}, {"temperature": 1e-29}, {"top_p": 1e-300}])
def test_extreme_sampling_is_greedy(model, options):
    prompt = [random_prompt(8)]
    greedy = np.asarray(model.generate(prompt, max_new_tokens=5, do_sample=False))
    assert np.array_equal(np.asarray(model.generate(prompt, max_new_tokens=5, do_sample=True, **options)), greedy)


def test_generation_config_keeps_other_keys_and_warns_of_what_is_not_served(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": 7, "transformers_version": "5", "repetition_penalty": 1.3, "min_p": null}')
    with pytest.warns(UserWarning, match="repetition_penalty will be ignored"):
        read = GenerationConfig.from_pretrained(tmp_path)
    assert read.to_dict() == {
        "eos_token_id": [7], "transformers_version": "5", "repetition_penalty": 1.3, "min_p": None,
    }  # fmt: skip
    assert GenerationConfig.from_pretrained("tiny").top_k == 40


def test_dtypes_in_every_spelling(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_pretrained("~/m")
    spellings = ["bfloat16", jax.numpy.bfloat16, jax.numpy.dtype("bfloat16")]
    try:
        import torch

        spellings.append(torch.bfloat16)
    except ModuleNotFoundError:
        pass
    for dtype in spellings:
        assert MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype).dtype == jax.numpy.bfloat16
    for device in (jax.devices("cpu")[0], jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])):
        assert MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "m", device=device).dtype == np.float32


def test_an_end_token_outside_the_vocabulary_is_refused_at_load(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(ValueError, match=f"eos_token_id = 9999: must be within 0..{VOCAB - 1}"):
        MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("style", ["transformers", "vendor"])
def test_a_saved_model_loads_with_the_same_answers(model, tmp_path, style):
    model.save_pretrained(tmp_path / "m", style=style)
    again = MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "m", dtype="float32")
    assert again.config == model.config
    assert all(np.array_equal(leaf, model.state()[name]) for name, leaf in again.state().items())
    ids = [random_prompt(30)]
    assert np.array_equal(np.asarray(again(ids).logits), np.asarray(model(ids).logits))
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        _ = again.tokenizer


def test_a_state_that_does_not_fit_is_refused(model):
    state = model.state()
    with pytest.raises(ValueError, match=r"norm\.weight"):
        MiniMaxM3ForCausalLM(model.config, {k: v for k, v in state.items() if k != "norm.weight"})
    with pytest.raises(ValueError, match="embed_tokens"):
        MiniMaxM3ForCausalLM(small_config(vocab_size=100), state)


def test_unknown_dtype_and_directory_are_refused():
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        MiniMaxM3ForCausalLM.from_pretrained("tiny", dtype="int8")
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        MiniMaxM3ForCausalLM.from_pretrained("/nowhere")
