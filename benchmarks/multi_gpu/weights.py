"""Models without files: M3 at full width with as many layers as fit, and weights drawn where they stay."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from minimax_jax import MiniMaxM3Config
from minimax_jax.model import abstract_model, split_model
from minimax_jax.parallel import Layout, ParallelConfig, Ranks
from minimax_jax.parallel.layout import Split
from minimax_jax.rank_slice.weights import WEIGHTS, draw_mxfp8, mxfp8_exponent, weight_structs
from minimax_jax.tensor_table import MXFP8_BLOCK, cache_bytes_per_token
from minimax_kernels import Mxfp8

M3_LAYERS, _M3_DENSE = 60, 3
# what a try on a CPU runs: M3's kinds of layers and heads, nothing else of its size
_TINY: dict[str, Any] = {
    "hidden_size": 64, "vocab_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "rotary_dim": 8, "dense_intermediate_size": 64, "intermediate_size": 16, "shared_intermediate_size": 16,
    "num_local_experts": 8, "num_experts_per_tok": 2, "index_n_heads": 4, "index_head_dim": 16,
    "index_block_size": 16, "index_topk_blocks": 2, "max_position_embeddings": 512,
}  # fmt: skip
# M3's kinds of layers and its heads at an eighth of its width: as many arrays and kernels, little arithmetic
_NARROW: dict[str, Any] = {
    "hidden_size": 768, "vocab_size": 2048, "dense_intermediate_size": 768,
    "intermediate_size": 256, "shared_intermediate_size": 256, "num_local_experts": 32,
}  # fmt: skip


def model_config(layers: int, size: str = "full") -> MiniMaxM3Config:
    """M3 with fewer layers; of each twenty one is dense, as in M3, but at least one.

    Args:
      size: "full", "narrow" (for what the host does) or "tiny" (for a CPU).
    """
    dense = max(1, round(layers * _M3_DENSE / M3_LAYERS))
    sizes: dict[str, Any] = {"full": {}, "narrow": _NARROW, "tiny": _TINY}[size]
    return MiniMaxM3Config(
        num_hidden_layers=layers,
        layer_types=("full_attention",) * dense + ("minimax_m3_sparse",) * (layers - dense),
        mlp_layer_types=("dense",) * dense + ("sparse",) * (layers - dense),
        **sizes,
    )


def random_weights(weights: str, config: MiniMaxM3Config, ranks: Ranks, dtype: Any) -> dict[str, Any]:
    """Weights drawn on the devices, each its own part; norms and biases are zeros.

    K/V heads that several ranks share are drawn for each of them: shapes and times are a model's, tokens are not.

    Args:
      weights: "bf16", or "mxfp8" for those in 8 bits that a checkpoint has so, drawn as bytes.
      dtype: of what is not in 8 bits.
    """
    structs = weight_structs(ranks.layout, weights, dtype)
    _, shapes = split_model(abstract_model(config, dtype))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    state = {}
    for key, (name, leaf) in zip(keys, shapes.items(), strict=True):
        splits = ranks.layout.splits(name)
        if isinstance(structs[name], Mxfp8):
            columns_first = ranks.layout.splits(name, columns_first=True)
            state[name] = _drawn_mxfp8(ranks, splits, columns_first, leaf.shape)(key, mxfp8_exponent(config, name))
        else:
            scale = 0.0 if leaf.ndim == 1 else leaf.shape[-2] ** -0.5
            state[name] = _drawn(ranks, splits, leaf.shape, leaf.dtype)(key, scale)
    return state


def _of_rank(key: Array, splits: tuple[Split, ...]) -> Array:
    for split in splits:
        key = jax.random.fold_in(key, jax.lax.axis_index(split.over))
    return key


@functools.lru_cache(maxsize=64)
def _drawn_mxfp8(
    ranks: Ranks, splits: tuple[Split, ...], columns_first: tuple[Split, ...], shape: tuple[int, ...]
) -> Callable[..., Mxfp8]:
    local = ranks.layout.local_shape(shape, splits)

    def draw(key: Array, exponent: Array) -> Mxfp8:
        return draw_mxfp8(_of_rank(key, splits), local, exponent)

    spec = ranks.layout.spec(columns_first)
    return jax.jit(ranks.per_rank(draw, (PartitionSpec(), PartitionSpec()), spec))


@functools.lru_cache(maxsize=64)
def _drawn(ranks: Ranks, splits: tuple[Split, ...], shape: tuple[int, ...], dtype: Any) -> Callable[..., Array]:
    local = ranks.layout.local_shape(shape, splits)

    def draw(key: Array, scale: Array) -> Array:
        key = _of_rank(key, splits)

        def numbers(key: Array, shape: tuple[int, ...]) -> Array:
            return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

        if len(local) < 3:
            return numbers(key, local)
        # an expert at a time: the bits of all of them would take more memory than the weights
        return jax.lax.map(lambda own: numbers(own, local[1:]), jax.random.split(key, local[0]))

    spec = ranks.layout.spec(splits)
    return jax.jit(ranks.per_rank(draw, (PartitionSpec(), PartitionSpec()), spec))


# how `--weights` are made: (config, ranks, dtype of what is not quantised) -> state
MAKERS: dict[str, Callable[[MiniMaxM3Config, Ranks, Any], dict[str, Any]]] = {
    weights: functools.partial(random_weights, weights) for weights in WEIGHTS
}
# bytes of a weight in memory, scales included; embedding and head, in bfloat16 always, are left to the reserve
ITEMSIZES = {"bf16": 2.0, "mxfp8": 1 + 1 / MXFP8_BLOCK}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a rank's memory has room for.

    Attributes:
      layers, pages: of the model, of each data rank's caches.
      weight_bytes, cache_bytes: on one rank.
    """

    layers: int
    pages: int
    weight_bytes: int
    cache_bytes: int


def layers_and_pages(
    parallel: ParallelConfig,
    memory: int,
    *,
    reserve: int,
    least_pages: int,
    most_pages: int,
    most_layers: int = M3_LAYERS,
    itemsize: float = 2.0,
    size: str = "full",
) -> Fit:
    """As many layers as fit beside `least_pages`, then as many pages as are wanted and fit.

    Args:
      memory: bytes of a device; reserve: of these, what steps need beside weights and caches.
      itemsize: bytes of a weight.

    Raises:
      ValueError: if not even two layers fit.
    """

    def weights(layers: int) -> int:
        return rank_weight_bytes(model_config(layers, size), parallel, itemsize)

    def page(layers: int) -> int:
        config = model_config(layers, size)
        layout = Layout(config, parallel)
        token = cache_bytes_per_token(layout.local_config, itemsize=2, index_ranks=layout.index_ranks)
        return config.index_block_size * token

    room = memory - reserve
    two, a_layer = weights(2), weights(3) - weights(2)  # a sparse layer, the larger kind
    a_page = page(3) - page(2)
    layers = min(most_layers, 2 + (room - two - least_pages * page(2)) // (a_layer + least_pages * a_page))
    if layers < 2:
        raise ValueError(f"memory = {memory}: must hold two layers of {a_layer} bytes and {reserve} bytes for steps")
    pages = min(most_pages, (room - weights(layers)) // page(layers))
    return Fit(layers, pages, weights(layers), pages * page(layers))


def rank_weight_bytes(config: MiniMaxM3Config, parallel: ParallelConfig, itemsize: float = 2.0) -> int:
    """Bytes of the weights that one rank holds; those few that are always float32 are counted like the others."""
    dense = sum(not config.is_sparse(i) for i in range(config.num_hidden_layers))
    kinds = {"layers.0": dense, "layers.1": config.num_hidden_layers - dense}
    # a layer of each kind stands for all of them
    two = config.replace(
        num_hidden_layers=2,
        layer_types=("full_attention", "minimax_m3_sparse"),
        mlp_layer_types=("dense", "sparse"),
    )
    layout, total = Layout(two, parallel), 0
    for name, shape in _shapes(two).items():
        count = kinds.get(".".join(name.split(".")[:2]), 1)
        total += count * math.prod(layout.local_shape(shape, layout.splits(name)))
    return round(total * itemsize)


@functools.lru_cache(maxsize=4)
def _shapes(config: MiniMaxM3Config) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in split_model(abstract_model(config, jnp.bfloat16))[1].items()}
