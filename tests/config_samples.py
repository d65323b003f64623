"""Configurations that the config tests share."""

import pytest

from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION, ConfigError, MiniMaxM3Config
from minimax_jax.presets import m3_config_json


def small_config(**changes):
    sizes = MiniMaxM3Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        rotary_dim=16, dense_intermediate_size=128, intermediate_size=32, shared_intermediate_size=96,
        num_local_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=16, index_block_size=16,
        index_topk_blocks=2, layer_types=(FULL_ATTENTION, SPARSE_ATTENTION, SPARSE_ATTENTION),
        mlp_layer_types=(DENSE_MLP, MOE_MLP, MOE_MLP),
    )  # fmt: skip
    return sizes.replace(**changes)


def vendor_json(**text_changes):
    content = m3_config_json()
    content["text_config"] |= text_changes
    return content


def error_of(content):
    with pytest.raises(ConfigError) as caught:
        MiniMaxM3Config.from_dict(content)
    return str(caught.value)
