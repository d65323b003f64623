"""Every form of config.json: fields, counts, round trips."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from config_samples import small_config, vendor_json
from hypothesis import example, given
from hypothesis import strategies as st

from minimax_jax.config import (
    DENSE_MLP,
    FULL_ATTENTION,
    MOE_MLP,
    SPARSE_ATTENTION,
    MiniMaxM3Config,
    VisionConfig,
)
from minimax_jax.presets import m3_config_json, m3_mxfp8_config_json
from minimax_jax.tensor_table import count_parameters, tensor_table

PARAMETERS = 427_040_140_160
TEXT_FIELDS = [
    field.name
    for field in dataclasses.fields(MiniMaxM3Config)
    if field.name not in ("vision", "quantization", "extra", "bos_token_id", "eos_token_id")
]


# ---- the released checkpoints


def test_m3_fields():
    config = MiniMaxM3Config.m3()
    expected = {
        "vocab_size": 200064, "hidden_size": 6144, "num_hidden_layers": 60, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "max_position_embeddings": 1048576, "rope_theta": 5e6, "rotary_dim": 64, "dense_intermediate_size": 12288,
        "intermediate_size": 3072, "shared_intermediate_size": 3072, "num_local_experts": 128,
        "num_experts_per_tok": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.0, "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0, "swiglu_beta": 1.0, "layer_types": ("full_attention",) * 3 + ("minimax_m3_sparse",) * 57,
        "mlp_layer_types": ("dense",) * 3 + ("sparse",) * 57, "index_n_heads": 4, "index_head_dim": 128,
        "index_block_size": 128, "index_topk_blocks": 16, "index_init_blocks": 0, "index_local_blocks": 1,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in TEXT_FIELDS} == expected
    assert (config.bos_token_id, config.eos_token_id, config.eos_token_ids) == (200034, 200020, (200020,))
    assert config.vision == VisionConfig(1280, 5120, 32, 16, 3, 14, 2, 2, 6144)
    assert config.quantization is None and not config.is_mxfp8
    assert config.extra["num_mtp_modules"] == 7
    assert config.extra["wrapper"]["image_token_index"] == 200025
    assert [config.is_sparse(i) for i in (0, 2, 3, 59)] == [False, False, True, True]
    assert [config.is_moe(i) for i in (0, 2, 3, 59)] == [False, False, True, True]


def test_mxfp8_fields():
    config, wide = MiniMaxM3Config.m3_mxfp8(), MiniMaxM3Config.m3()
    assert {n: getattr(config, n) for n in TEXT_FIELDS} == {n: getattr(wide, n) for n in TEXT_FIELDS}
    assert config.is_mxfp8 and config.vision == wide.vision
    assert config.quantization["weight_block_size"] == [1, 32]
    assert len(config.quantization["ignored_layers"]) == 5 + 57
    assert config.extra["num_mtp_modules"] == 1 and "num_nextn_predict_layers" not in config.extra


@pytest.mark.parametrize("preset", [MiniMaxM3Config.m3, MiniMaxM3Config.m3_mxfp8])
def test_parameters_of_the_released_model(preset):
    config = preset()
    assert config.num_parameters() == PARAMETERS
    counts = count_parameters(config)
    assert sum(counts.values()) == PARAMETERS
    assert counts["routed experts"] == 57 * 128 * 3 * 3072 * 6144
    assert counts["embedding"] == counts["head"] == 200064 * 6144
    assert counts["routers"] == 57 * 128 * 6145
    assert counts["index branch"] == 57 * (512 + 128) * 6144


def test_tensors_and_bytes_of_the_bf16_checkpoint():
    table = tensor_table(MiniMaxM3Config.m3())
    assert len(table) == 23_416
    assert sum(spec.size for spec in table.values()) == PARAMETERS
    in_float32 = 57 * (128 * 6144 + 128) + 1280 * 3 * 2 * 14 * 14
    assert sum(spec.size for spec in table.values() if spec.dtype == "F32") == in_float32
    assert sum(spec.num_bytes for spec in table.values()) == 2 * PARAMETERS + 2 * in_float32
    assert {spec.dtype for spec in table.values()} == {"BF16", "F32"}


def test_tensors_and_bytes_of_the_mxfp8_checkpoint():
    table = tensor_table(MiniMaxM3Config.m3_mxfp8())
    assert len(table) == 45_838
    attention = 60 * (2 * 8192 + 2 * 512) * 6144 + 57 * (512 + 128) * 6144
    mlps = 3 * 3 * 12288 * 6144 + 57 * 129 * 3 * 3072 * 6144
    quantised = attention + mlps
    in_float32 = 57 * (128 * 6144 + 128) + 1280 * 3 * 2 * 14 * 14
    kept = 2 * (PARAMETERS - quantised - in_float32) + 4 * in_float32
    assert sum(spec.num_bytes for spec in table.values()) == quantised + quantised // 32 + kept
    assert sum(spec.size for spec in table.values() if spec.is_parameter) == PARAMETERS
    assert sum(name.endswith("_scale_inv") for name in table) == 45_838 - 23_416


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("language_model.model.embed_tokens.weight", (200064, 6144), "BF16"),
        ("language_model.lm_head.weight", (200064, 6144), "BF16"),
        ("language_model.model.layers.0.self_attn.k_proj.weight", (512, 6144), "F8_E4M3"),
        ("language_model.model.layers.3.self_attn.index_k_proj.weight_scale_inv", (128, 192), "U8"),
        ("language_model.model.layers.0.mlp.down_proj.weight_scale_inv", (6144, 384), "U8"),
        ("language_model.model.layers.59.block_sparse_moe.experts.127.w2.weight", (6144, 3072), "F8_E4M3"),
        ("language_model.model.layers.59.block_sparse_moe.experts.127.w2.weight_scale_inv", (6144, 96), "U8"),
        ("language_model.model.layers.59.block_sparse_moe.gate.weight", (128, 6144), "F32"),
        ("language_model.model.layers.3.block_sparse_moe.e_score_correction_bias", (128,), "F32"),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", (1280, 3, 2, 14, 14), "F32"),
        ("patch_merge_mlp.linear_1.weight", (6144, 24576), "BF16"),
    ],
)
def test_tensors_of_the_released_checkpoints(name, shape, dtype):
    spec = tensor_table(MiniMaxM3Config.m3_mxfp8())[name]
    assert (spec.shape, spec.dtype) == (shape, dtype)


def test_dense_layers_have_no_index_branch_and_no_experts():
    names = tensor_table(MiniMaxM3Config.m3())
    assert not [n for n in names if ".model.layers.2." in n and ("index" in n or "block_sparse_moe" in n)]
    assert not [n for n in names if ".model.layers.3." in n and ".mlp." in n]


# ---- variants and round trips


def test_m3_1_like_variants():
    content = vendor_json(num_experts_per_tok=8)
    sparse = content["text_config"]["sparse_attention_config"]
    sparse |= {"sparse_attention_freq": [1] * 60, "sparse_disable_index_value": [1] * 60, "sparse_topk_blocks": 32}
    config = MiniMaxM3Config.from_dict(content)
    assert config.layer_types == (SPARSE_ATTENTION,) * 60 and config.mlp_layer_types[0] == DENSE_MLP
    assert (config.num_experts_per_tok, config.index_topk_blocks) == (8, 32)
    assert config.num_parameters() == PARAMETERS + 3 * ((512 + 128) * 6144 + 2 * 128)


def test_use_sparse_attention_false_makes_all_layers_dense():
    content = m3_config_json()
    content["text_config"]["sparse_attention_config"]["use_sparse_attention"] = False
    assert MiniMaxM3Config.from_dict(content).layer_types == (FULL_ATTENTION,) * 60


def test_the_bare_text_part_and_the_defaults():
    assert MiniMaxM3Config.from_dict(m3_config_json()["text_config"]) == MiniMaxM3Config.m3().replace(vision=None)
    assert MiniMaxM3Config(bos_token_id=200034, eos_token_id=200020) == MiniMaxM3Config.m3().replace(vision=None)


@pytest.mark.parametrize("source", [m3_config_json, m3_mxfp8_config_json])
def test_vendor_round_trip_keeps_everything(source):
    content = source()
    content["new_top"], content["text_config"]["new_text"] = {"a": [1, None]}, [2.5, "x"]
    content["vision_config"]["new_vision"] = True
    before = copy.deepcopy(content)
    config = MiniMaxM3Config.from_dict(content)
    assert content == before
    written = json.loads(json.dumps(config.to_dict("vendor")))
    assert {k: written[k] for k in before if k != "text_config"} == {
        k: v for k, v in before.items() if k != "text_config"
    }
    assert {k: written["text_config"][k] for k in before["text_config"]} == before["text_config"]
    again = MiniMaxM3Config.from_dict(written)
    assert again == config and again.extra == config.extra and again.vision.raw == config.vision.raw
    assert again.to_dict("vendor") == config.to_dict("vendor")


@pytest.mark.parametrize("style", ["vendor", "transformers"])
def test_round_trip_of_other_values(style):
    config = small_config(
        rope_theta=1e4, tie_word_embeddings=True, swiglu_beta=0.5, index_init_blocks=1, eos_token_id=(1, 2),
        bos_token_id=3, routed_scaling_factor=1.5, extra={"unknown": [1]},
    )  # fmt: skip
    again = MiniMaxM3Config.from_dict(json.loads(json.dumps(config.to_dict(style))))
    assert again == config and again.extra["unknown"] == [1]
    assert again.eos_token_ids == (1, 2)


@example(half_head=52, half_rotary=15, style="vendor")
@example(half_head=52, half_rotary=15, style="transformers")
@given(
    half_head=st.integers(1, 256), half_rotary=st.integers(1, 256), style=st.sampled_from(["vendor", "transformers"])
)
def test_rotary_dim_survives_the_factor(half_head, half_rotary, style):
    """Readers truncate head_dim * partial_rotary_factor: 104 * (30 / 104) would give 29."""
    config = small_config(head_dim=2 * half_head, index_head_dim=512, rotary_dim=2 * min(half_head, half_rotary))
    assert MiniMaxM3Config.from_dict(config.to_dict(style)) == config


def test_unknown_style():
    with pytest.raises(ValueError, match="style = 'gguf': must be 'vendor' or 'transformers'"):
        small_config().to_dict("gguf")


# ---- transformers


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def assert_text_fields(theirs, config):
    """transformers' text configuration says what ours says; it has no beta, initial blocks or shared count."""
    absent = {"swiglu_beta", "index_init_blocks", "n_shared_experts", "rope_theta", "rotary_dim"}
    for name in set(TEXT_FIELDS) - absent:
        value = getattr(theirs, name)
        assert (tuple(value) if isinstance(value, list) else value) == getattr(config, name), name
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    assert int(theirs.head_dim * rope["partial_rotary_factor"]) == config.rotary_dim


SMALL = {"released": MiniMaxM3Config.m3, "small": small_config, "tied": lambda: small_config(tie_word_embeddings=True)}


@pytest.mark.parametrize("name", SMALL)
def test_transformers_reads_what_we_write(transformers, name, tmp_path):
    config = SMALL[name]()
    text = transformers.MiniMaxM3VLTextConfig(**config.to_dict("transformers"))
    assert_text_fields(text, config)
    wrapper = transformers.MiniMaxM3VLConfig(**config.to_dict("vendor"))
    assert_text_fields(wrapper.text_config, config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict("transformers")))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, transformers.MiniMaxM3VLTextConfig)
    assert_text_fields(loaded, config)


@pytest.mark.parametrize("name", SMALL)
def test_we_read_what_transformers_writes(transformers, name, tmp_path):
    config = SMALL[name]().replace(vision=None, eos_token_id=None, bos_token_id=None)
    text = transformers.MiniMaxM3VLTextConfig(**config.to_dict("transformers"), initializer_range=0.5)
    text.save_pretrained(tmp_path / "text")
    read = MiniMaxM3Config.from_pretrained(tmp_path / "text")
    assert read.replace(eos_token_id=None, bos_token_id=None) == config
    assert read.extra["initializer_range"] == 0.5
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrapper = transformers.MiniMaxM3VLConfig(text_config=text.to_dict(), vision_config=vision, projector_hidden_size=40)
    wrapper.save_pretrained(tmp_path / "vl")
    read = MiniMaxM3Config.from_pretrained(tmp_path / "vl")
    assert read.replace(eos_token_id=None, bos_token_id=None, vision=None) == config
    assert read.vision == VisionConfig(32, 48, 1, 2, 3, 14, 2, 2, 40)
    assert read.num_parameters() > config.num_parameters()


def test_transformers_defaults_are_m3(transformers):
    theirs = transformers.MiniMaxM3VLTextConfig(
        layer_types=[FULL_ATTENTION] * 3 + [SPARSE_ATTENTION] * 57, mlp_layer_types=[DENSE_MLP] * 3 + [MOE_MLP] * 57,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    expected = MiniMaxM3Config.m3().replace(vision=None, max_position_embeddings=524288, bos_token_id=200034)
    assert MiniMaxM3Config.from_dict(theirs.to_dict()) == expected


def test_special_tokens_come_from_the_text_part_the_wrapper_or_the_model():
    assert MiniMaxM3Config.m3().eos_token_ids == (200020,) and MiniMaxM3Config.m3().bos_token_id == 200034
    config = m3_config_json() | {"eos_token_id": [200020, 200019], "bos_token_id": 200019}
    assert MiniMaxM3Config.from_dict(config).eos_token_ids == (200020, 200019)
    assert MiniMaxM3Config.from_dict(config).bos_token_id == 200019
    config["text_config"]["eos_token_id"] = 5
    assert MiniMaxM3Config.from_dict(config).eos_token_ids == (5,)
