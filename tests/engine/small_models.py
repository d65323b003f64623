"""Small random models that the generation tests share."""

import jax
import numpy as np

from minimax_jax import MiniMaxM3Config, MiniMaxM3ForCausalLM
from minimax_jax.model import abstract_model, split_model

VOCAB = 96


def small_config(**changes) -> MiniMaxM3Config:
    """Two layers, one dense and one sparse with experts; blocks of 16 tokens, two of them selected."""
    kinds = {
        "layer_types": ("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": ("dense", "sparse"),
    }
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "dense_intermediate_size": 48,
        "intermediate_size": 16,
        "shared_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 16,
        "index_topk_blocks": 2,
        "max_position_embeddings": 512,
    }
    return MiniMaxM3Config(**{**sizes, **kinds, **changes})


def small_model(seed: int = 0, scale: float = 0.24, **changes) -> MiniMaxM3ForCausalLM:
    """Random float32 weights, large enough that greedy choices are clear and vary.

    NumPy draws them: JAX compiles a draw for each shape, for longer than a test runs.
    """
    config, random = small_config(**changes), np.random.default_rng(seed)
    _, shapes = split_model(abstract_model(config, np.float32))
    state = {}
    for name, leaf in shapes.items():
        spread = 0.3 if name.endswith("norm.weight") else 0.02 if "mlp.gate." in name else scale
        drawn = leaf.ndim >= 2 or name.endswith("norm.weight")  # biases are zeros
        values = random.normal(0, spread, leaf.shape) if drawn else np.zeros(leaf.shape)
        state[name] = jax.numpy.asarray(values.astype(np.float32))
    return MiniMaxM3ForCausalLM(config, state)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Ids of a prompt."""
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
