"""Whole models against transformers on the same random weights: logits in float32, greedy continuations, bfloat16."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch_pairs import forward, pair_config, torch_model, weights_of  # noqa: E402

from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION  # noqa: E402

TOLERANCE = 2e-4
NEW_TOKENS = 32

# name -> (configuration, prompt length); with blocks of 16, 200 tokens are 13 blocks, of which few are chosen
CASES = {
    "index heads = kv heads = 2": (pair_config(), 200),
    "one index head for two kv heads": (pair_config(index_n_heads=1), 199),
    "four index heads for four kv heads": (
        pair_config(num_attention_heads=8, num_key_value_heads=4, index_n_heads=4, hidden_size=96),
        208,
    ),
    "more index heads than kv heads": (pair_config(num_attention_heads=8, index_n_heads=4), 177),
    "head_dim 128, block 128": (
        pair_config(head_dim=128, rotary_dim=64, index_head_dim=128, index_block_size=128, index_topk_blocks=2),
        520,
    ),
    "head_dim 128, block 16, one kv head": (
        pair_config(head_dim=128, rotary_dim=64, num_key_value_heads=1, index_n_heads=1, index_topk_blocks=4),
        150,
    ),
    "block 128, local 2 of topk 2, tied": (
        pair_config(index_block_size=128, index_local_blocks=2, index_topk_blocks=2, tie_word_embeddings=True),
        500,
    ),
    "no local block, topk 1": (pair_config(index_local_blocks=0, index_topk_blocks=1), 190),
    "no local block, topk 4": (pair_config(index_local_blocks=0, index_topk_blocks=4), 192),
    "local 2 of topk 3": (pair_config(index_local_blocks=2), 200),
    "the local block alone": (pair_config(index_topk_blocks=1), 200),
    "topk above the number of blocks": (pair_config(index_topk_blocks=64), 200),
    "tied embeddings": (pair_config(tie_word_embeddings=True), 200),
    "two dense layers first": (pair_config(layers=4, dense=2), 170),
    "four dense layers first": (pair_config(layers=6, dense=4), 160),
    "all layers sparse, top 8 of 16 experts": (
        pair_config(dense=0, num_local_experts=16, num_experts_per_tok=8, index_n_heads=1),
        380,
    ),
    "dense and sparse in turns": (
        pair_config(
            layers=4,
            layer_types=(SPARSE_ATTENTION, FULL_ATTENTION, SPARSE_ATTENTION, FULL_ATTENTION),
            mlp_layer_types=(MOE_MLP, MOE_MLP, DENSE_MLP, DENSE_MLP),
        ),
        200,
    ),
    "other constants": (
        pair_config(
            rms_norm_eps=1e-3, rope_theta=1e4, rotary_dim=16, index_head_dim=32, swiglu_alpha=1.1, swiglu_limit=0.7,
            routed_scaling_factor=1.3, num_experts_per_tok=1, num_local_experts=6,
        ),
        200,
    ),
}  # fmt: skip


def test_the_cases_are_as_many_as_promised():
    assert len(CASES) >= 14


def prompt_of(length, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, length)


def torch_greedy(model, prompt):
    """transformers' own generation, with its own cache: prompt and continuation."""
    ids = torch.tensor(prompt)[None]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **options)
    return out[0].numpy()


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)[None], use_cache=False).logits[0].float().numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(name):
    config, length = CASES[name]
    model = torch_model(config)
    sequence = torch_greedy(model, prompt_of(length, config.vocab_size))
    total = length + NEW_TOKENS
    assert sequence.shape == (total,)
    theirs = torch_logits(model, sequence)
    ours = np.asarray(forward(config, total)(weights_of(model, config), jnp.asarray(sequence), jnp.int32(total)))
    assert theirs.std() > 1
    assert np.abs(ours - theirs).max() <= TOLERANCE
    # ours continues as theirs does: given the same tokens so far, each next one is the same, from the prompt on
    np.testing.assert_array_equal(ours[length - 1 : -1].argmax(-1), sequence[length:])


def test_greedy_loop_of_full_forwards():
    """The continuation once more, each token from our own tokens before it."""
    config, length = CASES["index heads = kv heads = 2"]
    model = torch_model(config, seed=1)
    expected = torch_greedy(model, prompt_of(length, config.vocab_size, seed=1))
    weights, run = weights_of(model, config), forward(config, length + NEW_TOKENS)
    ids = np.zeros(length + NEW_TOKENS, np.int64)
    ids[:length] = expected[:length]
    for live in range(length, length + NEW_TOKENS):
        ids[live] = np.asarray(run(weights, jnp.asarray(ids), jnp.int32(live)))[live - 1].argmax()
    np.testing.assert_array_equal(ids, expected)


def test_selection_matters_in_these_models():
    """Parity would prove little if any choice of blocks gave the same logits."""
    config, length = CASES["index heads = kv heads = 2"]
    model = torch_model(config)
    ids = prompt_of(length, config.vocab_size)
    theirs = torch_logits(model, ids)
    for change in ({"index_topk_blocks": 4}, {"index_topk_blocks": 64}, {"index_local_blocks": 0}):
        other = config.replace(**change)
        ours = np.asarray(forward(other, length)(weights_of(model, other), jnp.asarray(ids), jnp.int32(length)))
        assert np.abs(ours - theirs).max() > 100 * TOLERANCE, change


def bfloat16_errors(config, length, seed=0):
    """(ours in bfloat16, transformers' in bfloat16), each less our float32 on the same rounded weights, per spread."""
    model = torch_model(config, seed)
    ids = prompt_of(length, config.vocab_size, seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.to(torch.bfloat16))
    exact = weights_of(model, config)
    args = jnp.asarray(ids), jnp.int32(length)
    wide = np.asarray(forward(config, length)(exact, *args))
    narrow = forward(config, length, jnp.bfloat16)(weights_of(model, config, jnp.bfloat16), *args)
    assert narrow.dtype == jnp.float32  # logits come in float32 whatever the weights are
    theirs = torch_logits(model.to(torch.bfloat16), ids)
    assert wide.std() > 1
    return (np.asarray(narrow) - wide) / wide.std(), (theirs - wide) / wide.std()


def rms(errors, axis=None):
    return np.sqrt((errors**2).mean(axis))


def test_bfloat16_where_nothing_is_chosen():
    """With all experts and all blocks taken, bfloat16 differs by rounding alone: 3e-2 of the logits' spread."""
    ours, theirs = bfloat16_errors(pair_config(num_experts_per_tok=4, index_topk_blocks=64), 200)
    assert rms(ours) <= 3e-2
    assert rms(ours) <= 1.2 * rms(theirs)  # and no worse than transformers' own bfloat16


def test_bfloat16_with_choices():
    """Rounding flips some near ties among experts and blocks, here and in transformers: the typical token counts."""
    ours, theirs = bfloat16_errors(pair_config(), 200)
    assert np.median(rms(ours, axis=1)) <= 3e-2
    assert np.median(rms(ours, axis=1)) <= 1.2 * np.median(rms(theirs, axis=1))
