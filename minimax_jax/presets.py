"""The config.json contents of the two released checkpoints, as facts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_IMAGE_TOKEN_COMPRESSION = {
    "image_token_compression_method": "patch_merge",
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def m3_config_json() -> dict[str, Any]:
    """MiniMax-M3 (BF16): wrapper, `text_config` and `vision_config` as the vendor writes them."""
    sides = range(336, 2017, 336)
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
        "image_token_index": 200025,
        "video_token_index": 200026,
        "image_seq_length": 576,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": 6144,
        "process_image_mode": "dynamic_res",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "num_reward_heads": 0,
        "image_grid_pinpoints": str([[a, b] for a in sides for b in sides]),
        "img_token_compression_config": dict(_IMAGE_TOKEN_COMPRESSION),
        "text_config": _text_config(),
        "vision_config": _vision_config(),
    }


def m3_mxfp8_config_json() -> dict[str, Any]:
    """MiniMax-M3-MXFP8: as the BF16 one, with `quantization_config` and one MTP module."""
    config = m3_config_json()
    text = config["text_config"]
    text["num_mtp_modules"] = 1
    del text["num_nextn_predict_layers"]
    text["dtype"] = "bfloat16"
    config["quantization_config"] = mxfp8_quantization(range(3, 60))
    return config


def mxfp8_quantization(moe_layers: Iterable[int], also: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of an MXFP8 checkpoint.

    Args:
      moe_layers: which layers have routers.
      also: further modules whose matrices are in floats, by the vendor's names.
    """
    routers = [f"language_model.model.layers.{i}.block_sparse_moe.gate" for i in moe_layers]
    return {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": [
            "lm_head",
            "model.embed_tokens",
            "vision_tower",
            "multi_modal_projector",
            "patch_merge_mlp",
            *routers,
            *also,
        ],
    }


def _text_config() -> dict[str, Any]:
    freq = [0] * 3 + [1] * 57
    return {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "hidden_size": 6144,
        "num_hidden_layers": 60,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 200064,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dense_intermediate_size": 12288,
        "intermediate_size": 3072,
        "shared_intermediate_size": 3072,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "moe_layer_freq": list(freq),
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "rope_theta": 5000000,
        "rotary_dim": 64,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 1048576,
        "num_mtp_modules": 7,
        "num_nextn_predict_layers": 1,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 128,
            "sparse_num_index_heads": 4,
            "sparse_topk_blocks": 16,
            "sparse_block_size": 128,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": list(freq),
            "sparse_disable_index_value": list(freq),
        },
    }


def _vision_config() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 1280,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "intermediate_size": 5120,
        "patch_size": 14,
        "image_size": 2016,
        "num_channels": 3,
        "projection_dim": 6144,
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "rope_theta": 10000.0,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "vision_segment_max_frames": 4,
        "vocab_size": 32000,
        "img_token_compression_config": dict(_IMAGE_TOKEN_COMPRESSION),
    }
