"""Tokenizer: reading a checkpoint's files, ids and text both ways, and streaming text."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimax_jax.tokenizer import TextStream, Tokenizer

SPECIAL = ["]!p~[", "]~b]", "[e~[", "]<]image[>[", "]<]video[>[", "]~!b["]
PLAIN = ["<tool_call>", "</tool_call>", "]<]minimax[>[", "<mm:think>", "</mm:think>", "größe é"]
CORPUS = ["the cat sat on the mat", "naïve café déjà vu", "日本語の文章です", "👩‍👩‍👧 🙂🙃 e\u0301"] * 4


def write_checkpoint(folder, **files):
    """A checkpoint folder with a small byte-level BPE that has M3's added tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    bpe.add_special_tokens(SPECIAL)
    bpe.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in PLAIN])
    bpe.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("m3")))


def streamed(tokenizer, ids, skip_special_tokens=True):
    stream = TextStream(tokenizer, skip_special_tokens)
    return [stream.push(i) for i in ids] + [stream.finish()]


@given(text=st.text())
@settings(deadline=None)
def test_text_survives_encoding_and_streaming(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert "".join(streamed(tokenizer, ids, skip_special_tokens=False)) == text


@given(data=st.data(), skip=st.booleans())
@settings(deadline=None, max_examples=400)
def test_stream_equals_decode_on_any_ids(tokenizer, data, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)
    stream, cut = TextStream(tokenizer, skip), data.draw(st.integers(0, len(ids)))
    assert stream.extend(ids[:cut]) + stream.extend(ids[cut:]) + stream.finish() == tokenizer.decode(ids, skip)


@given(raw=st.lists(st.sampled_from(list(b"a\x80\xa0\xbf\xc2\xe0\xe3\xed\xef\xf0\xf4\xf5\xff")), max_size=14))
@settings(deadline=None, max_examples=400)
def test_stream_equals_decode_on_invalid_utf8(tokenizer, raw):
    id_of = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [id_of[bytes([byte])] for byte in raw]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_holds_back_a_character_until_it_is_whole(tokenizer):
    id_of = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [id_of[bytes([byte])] for byte in "a🙂b".encode()]
    assert streamed(tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]
    assert streamed(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]


def test_stream_can_be_used_again_after_finish(tokenizer):
    stream = TextStream(tokenizer)
    half = next(i for i in range(256) if tokenizer.token_bytes(i) == b"\xe3")
    assert (stream.push(half), stream.finish()) == ("", "\ufffd")
    assert "".join(stream.push(i) for i in tokenizer.encode("cat")) + stream.finish() == "cat"


def test_markers_in_the_text_become_their_ids_and_nothing_is_added(tokenizer):
    ids = tokenizer.encode("]~b]user\nhi[e~[")
    assert ids[0] == tokenizer.token_to_id("]~b]")
    assert ids[-1] == tokenizer.token_to_id("[e~[")
    assert tokenizer.encode("") == []


def test_a_post_processor_and_truncation_in_the_file_are_not_applied(tmp_path):
    path = write_checkpoint(tmp_path) / "tokenizer.json"
    plain = Tokenizer.from_pretrained(tmp_path).encode("the cat sat")
    backend = tokenizers.Tokenizer.from_file(str(path))
    bos = ("]~!b[", backend.token_to_id("]~!b["))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="]~!b[ $A", special_tokens=[bos])
    backend.enable_truncation(1)
    backend.enable_padding(length=64)
    backend.save(str(path))
    assert Tokenizer.from_pretrained(tmp_path).encode("the cat sat") == plain


def test_only_special_tokens_are_skipped(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in SPECIAL + PLAIN]
    assert tokenizer.decode(ids) == "".join(PLAIN)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(SPECIAL + PLAIN)


def test_numpy_ids_decode(tokenizer):
    ids = tokenizer.encode("the mat")
    assert tokenizer.decode(np.array(ids, np.int32)) == "the mat"
    assert "".join(streamed(tokenizer, np.array(ids, np.uint32))) == "the mat"


def test_ids_without_a_token_add_nothing(tokenizer):
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.decode([tokenizer.vocab_size, 2**32 - 1]) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_vocab_size_counts_added_tokens(tokenizer):
    assert tokenizer.vocab_size == tokenizer.token_to_id(PLAIN[-1]) + 1


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (-1, ValueError, "2\\*\\*32.*-1"),
        (2**32, ValueError, "2\\*\\*32"),
        (1.0, TypeError, "integer, got float"),
    ],
)
def test_bad_ids_are_refused(tokenizer, bad, error, message):
    with pytest.raises(error, match=message):
        tokenizer.decode([bad])
    with pytest.raises(error, match=message):
        TextStream(tokenizer).push(bad)


def test_bad_text_is_refused(tokenizer):
    with pytest.raises(TypeError, match="text: must be str, got bytes"):
        tokenizer.encode(b"x")
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ["[e~["]),
        ({"tokenizer_config": {"eos_token": {"content": "]!p~["}}}, ["]!p~["]),
        ({"config": {"text_config": {"eos_token_id": 7}}, "tokenizer_config": {"eos_token": "]!p~["}}, [7]),
        ({"generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 7}}, [5, 6]),
        ({"generation_config": {"eos_token_id": 0}, "config": {"eos_token_id": 7}}, [0]),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 7}}, [7]),
    ],
)
def test_eos_comes_from_the_first_file_that_names_it(tmp_path, files, expected):
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, **files))
    expected = tuple(tokenizer.token_to_id(e) if isinstance(e, str) else e for e in expected)
    assert tokenizer.eos_token_ids == expected
    assert tokenizer.eos_token_id == expected[0]


def test_bos_is_the_tokenizers_own(tmp_path):
    files = {"tokenizer_config": {"bos_token": "]~!b["}, "generation_config": {"bos_token_id": 3}}
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, **files))
    assert tokenizer.bos_token_id == tokenizer.token_to_id("]~!b[")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "Unknown"}}', "\x00\x01"])
def test_a_broken_tokenizer_json_is_one_clear_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_decoder_that_is_not_byte_level_is_refused(tmp_path):
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="decoder must be ByteLevel, got NoneType"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
def test_broken_side_files_are_named(tmp_path, name):
    write_checkpoint(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[1]", "must hold a JSON object, got list")):
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{name}\.json.* {message}"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["[e~[", [1, "2"], -1, True])
def test_a_wrong_eos_id_is_refused(tmp_path, value):
    write_checkpoint(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be"):
        Tokenizer.from_pretrained(tmp_path)


def test_chat_template_file_wins_over_the_setting(tmp_path):
    write_checkpoint(tmp_path, tokenizer_config={"chat_template": "setting {{ bos_token }}", "bos_token": "]~!b["})
    messages = [{"role": "user", "content": "hi"}]
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False) == "setting ]~!b["
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }} {{ extra }}")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(messages, tokenize=False, extra="é")
    assert text == "file hi é"
    assert tokenizer.apply_chat_template(messages, extra="é") == tokenizer.encode(text)


def test_named_chat_templates_use_the_default(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, tokenizer_config={"chat_template": named}))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "plain"


def test_no_chat_template_says_where_one_belongs(tokenizer):
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match=r"tokenizer\.json: no chat_template\.jinja"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
