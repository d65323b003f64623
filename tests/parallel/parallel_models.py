"""Random models that parallel tests spread over eight CPU devices, and what they compare."""

import functools
import math

import jax
import numpy as np
import pytest

from minimax_jax import MiniMaxM3Config, MiniMaxM3ForCausalLM
from minimax_jax.checkpoint.load import plan_load
from minimax_jax.parallel import Layout, ParallelConfig, Ranks
from minimax_jax.paths import model_directory

VOCAB = 96
# sizes in the order of ParallelConfig
TENSOR = [(2, 1, 1), (4, 1, 1), (8, 1, 1)]
EXPERT = [(1, 2, 1), (1, 4, 1), (1, 8, 1)]
MIXED = [(8, 8, 1), (4, 8, 1), (8, 2, 1), (2, 4, 1)]
DATA = [(1, 8, 8), (2, 8, 4), (4, 8, 2), (2, 2, 2)]
LAYOUTS = TENSOR + EXPERT + MIXED + DATA


def four_head_config(**changes) -> MiniMaxM3Config:
    """A dense and a sparse layer, 8 query heads, 4 KV and 4 index heads, 8 experts, blocks of 16, two selected."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rotary_dim": 8,
        "dense_intermediate_size": 48,
        "intermediate_size": 16,
        "shared_intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_block_size": 16,
        "index_topk_blocks": 2,
        "max_position_embeddings": 512,
        "layer_types": ("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": ("dense", "sparse"),
    }
    return MiniMaxM3Config(**{**sizes, **changes})


@functools.cache
def one_device(seed: int = 0, **changes) -> MiniMaxM3ForCausalLM:
    """Random float32 weights, large enough that greedy choices vary, and norms that are not all alike."""
    model = MiniMaxM3ForCausalLM.from_config(four_head_config(**changes), seed=seed)
    key, state = jax.random.key(seed + 1), {}
    for i, (name, leaf) in enumerate(model.state().items()):
        if leaf.ndim >= 2:
            state[name] = leaf if "mlp.gate." in name else leaf * 8
        else:
            state[name] = 0.3 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
    return MiniMaxM3ForCausalLM(model.config, state)


@functools.cache
def over_ranks(sizes: tuple[int, int, int], **options) -> MiniMaxM3ForCausalLM:
    """`one_device()` over ranks; tests share it, and so what it has compiled."""
    return spread(one_device(), sizes, **options)


def spread(model: MiniMaxM3ForCausalLM, sizes: tuple[int, int, int], **options) -> MiniMaxM3ForCausalLM:
    """The same weights over ranks; `options` are further ones of `ParallelConfig`."""
    ranks = Ranks(model.config, ParallelConfig(*sizes, **options))
    state = {name: ranks.put(name, leaf) for name, leaf in model.state().items()}
    return MiniMaxM3ForCausalLM(model.config, state, ranks=ranks, generation_config=model.generation_config)


def prompts(*lengths: int, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, length).tolist() for length in lengths]


def stored_bytes(directory, sizes, ranks, itemsize=2):
    """Bytes of the file that these ranks' parts are, each different part counted once.

    `itemsize` is that of stored matrices.
    """
    config = MiniMaxM3Config.from_pretrained(model_directory(directory))
    layout, total = Layout(config, ParallelConfig(*sizes)), 0
    with plan_load(directory, config) as plan:
        for name, tensor in plan.tensors.items():
            size = 4 if tensor.float32 else itemsize
            parts = {layout.ranges(tensor.shape, layout.splits(name), rank) for rank in ranks}
            total += size * sum(math.prod(sum(b - a for a, b in axis) for axis in part) for part in parts)
    return total


def cases(layouts: list[tuple[int, int, int]], *, usual: list[tuple[int, int, int]] | None = None) -> list:
    """Parameters of a test: slow ones, since each layout compiles for seconds, and long those that are not `usual`."""

    def mark(sizes):
        return pytest.mark.slow if usual is None or sizes in usual else pytest.mark.long

    return [pytest.param(sizes, id=name_of(sizes), marks=mark(sizes)) for sizes in layouts]


def name_of(sizes: tuple[int, int, int]) -> str:
    """For test ids."""
    return "tp{}-ep{}-adp{}".format(*sizes)
