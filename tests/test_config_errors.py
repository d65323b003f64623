"""Configurations that cannot be: each error names the key, its value and what is allowed."""

from __future__ import annotations

import copy
import json

import pytest
from config_samples import error_of, small_config, vendor_json
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax.config import (
    FULL_ATTENTION,
    MOE_MLP,
    ConfigError,
    MiniMaxM3Config,
)
from minimax_jax.presets import m3_config_json, m3_mxfp8_config_json

# ---- impossible values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "index_n_heads": 2},
         "num_attention_heads = 6: must be a multiple of num_key_value_heads = 4"),
        ({"num_key_value_heads": 2, "index_n_heads": 3}, "index_n_heads = 3: must be a divisor of"),
        ({"index_n_heads": 8}, "index_n_heads = 8: must be a divisor of num_attention_heads = 4"),
        ({"rotary_dim": 15}, "rotary_dim = 15: must be even and at most head_dim = 32 and index_head_dim = 16"),
        ({"rotary_dim": 18}, "rotary_dim = 18: must be even and at most"),
        ({"index_block_size": 96}, "index_block_size = 96: must be a power of two"),
        ({"index_block_size": 0}, "index_block_size = 0: must be an integer >= 1"),
        ({"index_local_blocks": 3}, r"index_topk_blocks = 2: must be at least .* = 3"),
        ({"index_init_blocks": 2}, r"index_topk_blocks = 2: must be at least .* = 3"),
        ({"index_init_blocks": -1}, "index_init_blocks = -1: must be an integer >= 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5: must be at most num_local_experts = 4"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2: must be 1"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0: must be 1"),
        ({"layer_types": (FULL_ATTENTION,) * 2}, "layer_types has 2 entries: must be num_hidden_layers = 3"),
        ({"layer_types": (FULL_ATTENTION, "linear", FULL_ATTENTION)},
         r"layer_types\[1\] = 'linear': must be one of 'full_attention', 'minimax_m3_sparse'"),
        ({"mlp_layer_types": (MOE_MLP, MOE_MLP, 1)}, r"mlp_layer_types\[2\] = 1: must be one of 'dense', 'sparse'"),
        ({"hidden_size": 64.0}, "hidden_size = 64.0: must be an integer >= 1"),
        ({"index_topk_blocks": 2**31}, "index_topk_blocks = 2147483648: must be at most 2147483647"),
        ({"vocab_size": True}, "vocab_size = True: must be an integer >= 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0: must be a finite number > 0"),
        ({"rope_theta": "5e6"}, "rope_theta = '5e6': must be a finite number > 0"),
        ({"rope_theta": float("inf")}, "rope_theta = inf: must be a finite number > 0"),
        ({"swiglu_limit": None}, "swiglu_limit = None: must be a finite number > 0"),
        ({"swiglu_alpha": "x"}, "swiglu_alpha = 'x': must be a finite number"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor = nan: must be a finite number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
        ({"eos_token_id": 96}, r"eos_token_id = 96: must be null or within 0\.\.95"),
        ({"eos_token_id": (1, -1)}, r"eos_token_id = \(1, -1\): must be null or within 0\.\.95"),
        ({"bos_token_id": 1.5}, r"bos_token_id = 1.5: must be null or within 0\.\.95"),
    ],
)  # fmt: skip
def test_impossible_values(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        small_config(**changes)
    assert len(str(caught.value).splitlines()) == 2  # the heading and this one problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "6144"}, "hidden_size = '6144': must be an integer >= 1"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers = 1000000000000000: must be at most"),
        ({"head_dim": 10**400}, "head_dim = 10+: must be at most 2147483647"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax': must be 'sigmoid'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'swigluoai' or 'silu'"),
        ({"use_gemma_norm": False}, "use_gemma_norm = False: must be True"),
        ({"attention_output_gate": True}, "attention_output_gate = True: must be False"),
        ({"qk_norm_type": "per_layer"}, "qk_norm_type = 'per_layer': must be 'per_head'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = .*yarn.*: must be None"),
        ({"rotary_dim": 32}, "rotary_dim = 32: must be head_dim . partial_rotary_factor = 64"),
        ({"partial_rotary_factor": "0.5"}, r"partial_rotary_factor = '0.5': must be a number in \(0, 1\]"),
        ({"partial_rotary_factor": 2}, r"partial_rotary_factor = 2: must be a number in \(0, 1\]"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn': must be 'default'"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default': must be an object"),
        ({"sparse_attention_config": [1]}, r"sparse_attention_config = \[1\]: must be an object"),
        ({"moe_layer_freq": [1] * 59}, "moe_layer_freq has 59 entries: must be num_hidden_layers = 60"),
        ({"moe_layer_freq": [2] + [1] * 59}, r"moe_layer_freq\[0\] = 2: must be 0 or 1"),
        ({"moe_layer_freq": 1}, "moe_layer_freq = 1: must be a list of 0 and 1"),
        ({"layer_types": 60}, "layer_types = 60: must be a list"),
        ({"eos_token_id": 2.0}, "eos_token_id = 2.0: must be null, an integer or a list"),
    ],
)
def test_impossible_json(changes, message):
    with pytest.raises(ConfigError, match=message):
        MiniMaxM3Config.from_dict(vendor_json(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_score_type": "mean"}, "sparse_score_type = 'mean': must be 'max'"),
        ({"sparse_block_size": 100}, "index_block_size = 100: must be a power of two"),
        ({"sparse_attention_freq": [1] * 3}, "sparse_attention_freq has 3 entries: must be num_hidden_layers = 60"),
        ({"sparse_disable_index_value": [0] * 60}, r"sparse_disable_index_value\[3\] = 0: must be 1"),
    ],
)
def test_impossible_sparse_attention(changes, message):
    content = m3_config_json()
    content["text_config"]["sparse_attention_config"] |= changes
    with pytest.raises(ConfigError, match=message):
        MiniMaxM3Config.from_dict(content)


def test_other_models_and_missing_keys():
    assert "model_type = 'llama': must be one of 'minimax_m3_vl', 'minimax_m3_vl_text'" in error_of(
        vendor_json() | {"model_type": "llama"}
    )
    message = error_of({})
    for key in ("hidden_size", "num_hidden_layers", "num_local_experts", "head_dim"):
        assert f"{key} is missing" in message


def test_several_problems_are_one_message():
    message = error_of(vendor_json(hidden_size=0, scoring_func="softmax", rope_parameters=3) | {"model_type": "x"})
    assert [line.split(" = ")[0].strip() for line in message.splitlines()[1:]] == [
        "model_type", "hidden_size", "rope_parameters", "scoring_func",
    ]  # fmt: skip
    content = vendor_json(moe_layer_freq=[1] * 7, rotary_dim=10)
    content["text_config"]["sparse_attention_config"]["sparse_attention_freq"] = [3] * 60
    content["vision_config"]["patch_size"] = None
    message = error_of(content)
    for key in ("moe_layer_freq", "rotary_dim", "sparse_attention_freq[0]", "vision_config.patch_size"):
        assert f"\n  {key}" in message
    with pytest.raises(ConfigError) as caught:
        small_config(rotary_dim=33, index_block_size=3, num_experts_per_tok=9, mlp_layer_types=())
    for key in ("rotary_dim", "index_block_size", "num_experts_per_tok", "mlp_layer_types"):
        assert f"\n  {key}" in str(caught.value)


# ---- files


def test_from_pretrained_without_directory_or_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        MiniMaxM3Config.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        MiniMaxM3Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b"{}", "hidden_size is missing"),
    ],
)  # fmt: skip
def test_from_pretrained_of_bad_files(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        MiniMaxM3Config.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_from_pretrained_of_good_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(m3_mxfp8_config_json()))
    assert MiniMaxM3Config.from_pretrained(str(tmp_path)) == MiniMaxM3Config.m3_mxfp8()


def places(content, path=()):
    """Every key of the content, and the first entry of every list."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content[:1]):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


FORMS = [m3_config_json(), m3_mxfp8_config_json(), MiniMaxM3Config.m3().to_dict("transformers")]
DELETE = object()
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([10**9, 10**30, 10**400]), st.floats(),
    st.text(max_size=4),
)  # fmt: skip
junk = st.one_of(
    scalars,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    st.just(DELETE),
)


@settings(max_examples=400)
@given(form=st.sampled_from(FORMS), data=st.data())
def test_no_file_raises_anything_but_a_config_error(form, data):
    content = copy.deepcopy(form)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, key = data.draw(st.sampled_from(list(places(content))))
        home = content
        for step in path:
            home = home[step]
        value = data.draw(junk)
        if value is DELETE:
            del home[key]
        else:
            home[key] = value
        if not content:
            break
    problem = ""
    try:
        config = MiniMaxM3Config.from_dict(content)
    except ConfigError as error:
        problem = str(error)
    if problem:
        assert all("must" in line or "is missing" in line for line in problem.splitlines()[1:])
        return
    hash(config)
    assert isinstance(config.is_mxfp8, bool) and isinstance(config.eos_token_ids, tuple)
    for style in ("vendor", "transformers"):
        again = MiniMaxM3Config.from_dict(config.to_dict(style))
        expected = config if style == "vendor" else config.replace(vision=None, quantization=again.quantization)
        assert again == expected


def test_sparse_attention_must_say_where():
    config = m3_config_json()
    del config["text_config"]["sparse_attention_config"]["sparse_attention_freq"]
    with pytest.raises(ConfigError, match=r"sparse_attention_freq is missing"):
        MiniMaxM3Config.from_dict(config)


def test_vision_sizes_are_bounded():
    config = m3_config_json()
    config["vision_config"]["num_hidden_layers"] = 10**30
    with pytest.raises(ConfigError, match=r"vision_config\.num_hidden_layers = 10+: must be an integer from 1 to"):
        MiniMaxM3Config.from_dict(config)
