"""transformers' own model with these kernels behind its attention registry: the same logits, the same tokens."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch_pairs import pair_config, text_config, torch_model  # noqa: E402

from minimax_jax.torch import patch_transformers, register_attention  # noqa: E402
from minimax_jax.torch.transformers_attention import context_lengths, minimax_attention  # noqa: E402

TOLERANCE = 2e-4
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CASES = {
    "index heads = kv heads = 2": pair_config(),
    "one index head for two kv heads": pair_config(index_n_heads=1),
    "more index heads than kv heads": pair_config(num_attention_heads=8, index_n_heads=4),
    "two dense layers, no local block": pair_config(layers=4, dense=2, index_local_blocks=0),
}


def ids_of(rows=2, length=100, seed=1):
    """Ids without the pad token, from which `generate` would make a mask."""
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def patched(model):
    return patch_transformers(copy.deepcopy(model))


@pytest.fixture(scope="module")
def pair():
    """(transformers' model as it is, the same patched)."""
    model = torch_model(pair_config())
    return model, patched(model)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_and_generated_tokens(name):
    model = torch_model(CASES[name])
    other, ids = patched(model), ids_of()
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("eager", "minimax_jax")
    expected = model(ids).logits
    assert expected.std() > 1
    torch.testing.assert_close(other(ids).logits, expected, atol=TOLERANCE, rtol=0)
    tokens = model.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(other.generate(ids, max_new_tokens=20, **GREEDY), tokens)


@torch.no_grad()
def test_static_caches_are_served_too(pair):
    model, other = pair
    options = {"max_new_tokens": 8, "cache_implementation": "static", **GREEDY}
    assert torch.equal(other.generate(ids_of(), **options), model.generate(ids_of(), **options))


@torch.no_grad()
def test_compiled_generation_has_no_graph_break():
    """transformers compiles its decode steps over static caches by itself on a GPU; here it is told to."""
    torch._dynamo.reset()
    model = torch_model(pair_config(mlp_layer_types=("dense",) * 3))  # its experts have graph breaks of their own
    options = {"max_new_tokens": 8, **GREEDY}
    expected = model.generate(ids_of(), **options)
    compiler = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiler._compile_all_devices = True
    tokens = patched(model).generate(ids_of(), cache_implementation="static", compile_config=compiler, **options)
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_padding_on_the_right_stays_with_the_kernels(pair):
    model, other = pair
    ids, mask = ids_of(), torch.ones(2, 100, dtype=torch.long)
    mask[0, 60:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = other(ids, attention_mask=mask).logits
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_padding_on_the_left_is_sdpa_and_says_so(pair):
    model, other = pair
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("sdpa")
    ids, mask = ids_of(), torch.ones(2, 100, dtype=torch.long)
    mask[0, :40] = 0
    with pytest.warns(UserWarning, match="falls back to transformers' 'sdpa'"):
        logits = other(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, reference(ids, attention_mask=mask).logits)
    options = {"attention_mask": mask, "max_new_tokens": 5, **GREEDY}
    with pytest.warns(UserWarning, match="falls back"):
        tokens = other.generate(ids, **options)
    assert torch.equal(tokens, reference.generate(ids, **options))


@torch.no_grad()
def test_packed_sequences_are_sdpa_and_say_so(pair):
    model, other = pair
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("sdpa")
    packed = {"input_ids": ids_of(1), "position_ids": torch.cat([torch.arange(40), torch.arange(60)])[None]}
    with pytest.warns(UserWarning, match="falls back"):
        logits = other(**packed, use_cache=False).logits
    torch.testing.assert_close(logits, reference(**packed, use_cache=False).logits)


def test_a_cache_of_whole_pages_is_read_where_it_lies(pair, monkeypatch):
    import minimax_jax.torch.transformers_attention as attention

    seen = []
    monkeypatch.setattr(attention, "dense_attention", lambda q, k, v, batch, scale: (seen.append((k, v)), q)[1])
    _, other = pair
    key, value = torch.randn(2, 2, 2, 64, 64)
    query = torch.randn(2, 4, 1, 64)
    lengths = context_lengths(2, 1, 64, q_offset=torch.tensor(39))
    assert lengths.flatten().tolist() == [40, 40]
    minimax_attention(other.model.layers[0].self_attn, query, key, value, lengths, 0.125)
    ((k_pages, v_pages),) = seen
    assert (k_pages.data_ptr(), v_pages.data_ptr()) == (key.data_ptr(), value.data_ptr())
    assert k_pages.shape == (16, 1, 16, 64)


def test_gradients_and_dropout_are_refused(pair):
    _, other = pair
    with pytest.raises(ValueError, match="q requires grad: these operations have no gradient"):
        other(ids_of(1, 20))
    with pytest.raises(ValueError, match=r"dropout = 0.1: must be 0"):
        minimax_attention(other.model.layers[0].self_attn, *torch.zeros(3, 1, 4, 2, 64), None, 0.1, dropout=0.1)


def test_other_models_are_refused_and_the_patch_can_be_undone(pair):
    with pytest.raises(ValueError, match="model is Linear: must be a MiniMax-M3 of transformers"):
        patch_transformers(torch.nn.Linear(2, 2))
    model = patched(pair[0])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(ids_of(1, 20)).logits, pair[0](ids_of(1, 20)).logits)


def test_the_name_can_be_asked_for_at_construction():
    register_attention()
    config = text_config(pair_config())
    config._attn_implementation = "minimax_jax"
    model = transformers.MiniMaxM3VLForCausalLM(config).eval()
    with torch.no_grad():
        assert model(ids_of(1, 20)).logits.shape == (1, 20, 96)


def test_the_vision_tower_keeps_its_attention():
    text = pair_config().to_dict("transformers")
    config = transformers.MiniMaxM3VLConfig(
        text_config=text,
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        model = transformers.MiniMaxM3SparseForConditionalGeneration(config)
    before = model.config.vision_config._attn_implementation
    assert patch_transformers(model) is model
    assert model.config.text_config._attn_implementation == "minimax_jax"
    assert model.config.vision_config._attn_implementation == before != "minimax_jax"
