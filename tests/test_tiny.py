"""The embedded checkpoint: what it is, how well it predicts, and that transformers agrees with it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.attention import ReferenceAttend
from minimax_jax.checkpoint import check_checkpoint
from minimax_jax.config import FULL_ATTENTION
from minimax_jax.model import abstract_model, merge_model, split_model
from minimax_jax.paths import model_directory

HELD_OUT = Path(__file__).parent / "data" / "held_out.txt"  # Nehemiah, King James Version: not in the training text


@pytest.fixture(scope="module")
def model():
    return MiniMaxM3ForCausalLM.from_pretrained("tiny", dtype="float32")


@pytest.fixture(scope="module")
def held_out(model):
    ids = model.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))
    return np.array([model.config.bos_token_id, *ids][:1280], np.int32)


@pytest.fixture(scope="module")
def logits(model, held_out):
    return np.asarray(model(held_out[None]).logits)[0]


def losses(logits, ids):
    log_probabilities = np.asarray(jax.nn.log_softmax(logits[:-1]))
    return -log_probabilities[np.arange(len(ids) - 1), ids[1:]]


def test_it_has_every_part_and_fits_the_repository(model):
    config = model.config
    assert config.index_n_heads == 4 and config.index_block_size == 128 and config.max_position_embeddings >= 8192
    assert config.layer_types[0] == FULL_ATTENTION and config.is_sparse(5) and config.is_moe(5)
    assert model.num_parameters() == config.num_parameters() == 5_766_912
    directory = model_directory("tiny")
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 12_000_000
    report = check_checkpoint(directory, read_values=True)
    assert report.ok and report.style == "vendor" and set(report.bytes_by_dtype) == {"BF16", "F32"}


def test_tokenizer_has_the_special_tokens(model):
    tokenizer, config = model.tokenizer, model.config
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.token_to_id("]~!b[") == config.bos_token_id
    assert (tokenizer.token_to_id("[e~["),) == config.eos_token_ids == model.generation_config.eos_token_id
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], thinking_mode="enabled", tokenize=False)
    assert text.startswith("]~!b[]~b]system\n") and text.endswith("]~b]ai\n<mm:think>")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_it_predicts_text_it_has_not_seen(logits, held_out):
    """A uniform guess costs ln 2048 = 7.62 nats a token, an untrained model the same; see the card for 41 documents."""
    found = losses(logits, held_out)
    assert len(found) == 1279 and found.mean() < 3.0
    assert found[1024:].mean() < 3.0  # where a token sees part of its context only


def test_sparse_attention_loses_next_to_nothing_against_dense(model, held_out, logits):
    """The same weights with every block selected, past the 1,024 tokens up to which the two are equal."""
    config = model.config.replace(index_topk_blocks=64)
    graphdef, _ = split_model(abstract_model(config, jnp.float32))
    length = len(held_out)
    attend = ReferenceAttend(config, jnp.array([0, length]), length)
    dense = jax.jit(lambda w, ids: merge_model(graphdef, w)(ids, jnp.arange(length), attend))(model.state(), held_out)
    dense = np.asarray(dense)
    np.testing.assert_allclose(dense[:1024], logits[:1024], atol=1e-4)
    assert np.abs(dense[1024:] - logits[1024:]).max() > 1e-3
    assert losses(logits, held_out)[1024:].mean() < 1.01 * losses(dense, held_out)[1024:].mean()


def test_fp8_caches_cost_next_to_nothing(model, held_out, logits):
    """scripts/tiny_cache_loss.py measures it on long documents."""
    past = model.empty_past_key_values(1, max_cache_len=len(held_out), cache_dtype="fp8")
    narrow = np.asarray(model(held_out[None], past_key_values=past).logits)[0]
    assert np.abs(narrow - logits).max() > 1e-2
    assert losses(narrow, held_out).mean() < 1.005 * losses(logits, held_out).mean()


def test_generated_text_is_made_of_english_words(model):
    """Most words of a sample are words of the held-out chapters or common ones, not letter soup."""
    ids = [model.config.bos_token_id, *model.tokenizer.encode("And it came to pass, that")]
    out = np.asarray(model.generate([ids], max_new_tokens=120, seed=0))[0, len(ids) :]
    words = "".join(c if c.isalpha() else " " for c in model.tokenizer.decode(out.tolist())).lower().split()
    known = set("".join(c if c.isalpha() else " " for c in HELD_OUT.read_text()).lower().split())
    assert len(words) > 40
    assert sum(word in known for word in words) / len(words) > 0.6


def test_transformers_agrees(model, held_out, logits, tmp_path):
    """Saved in transformers' style and run there, on a prompt that is longer than the selected blocks."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path / "m")
    theirs, info = transformers.MiniMaxM3VLForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = held_out[:1200]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.int64)[None]).logits[0].numpy()
        prompt = torch.tensor(ids[:1100], dtype=torch.int64)[None]
        continued = theirs.generate(prompt, do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0)
    assert np.abs(expected - logits[:1200]).max() <= 2e-4
    ours = model.generate(prompt, do_sample=False, max_new_tokens=16, eos_token_id=-1)
    assert ours.tolist() == continued.tolist()
