"""An `LLM` over one tensor-parallel rank's share of MiniMax-M3 with random weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.segments.rank_model import rank_config
from minimax_jax import LLM, MiniMaxM3ForCausalLM
from minimax_jax.model import abstract_model, split_model


def rank_llm(layers: int, *, moe: bool, tiny: bool, **options: Any) -> LLM:
    """The engine as users get it, over weights that are drawn on the device; options as `LLM` takes them."""
    config = rank_config(layers, moe=moe, tiny=tiny)
    dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    _, shapes = split_model(abstract_model(config, dtype))
    draw = jax.jit(
        lambda key, shape, dtype, scale: (scale * jax.random.normal(key, shape, dtype)).astype(dtype),
        static_argnums=(1, 2),
    )
    keys = jax.random.split(jax.random.key(0), len(shapes))
    state = {
        name: draw(key, leaf.shape, leaf.dtype, 0.0 if leaf.ndim == 1 else leaf.shape[-2] ** -0.5)
        for key, (name, leaf) in zip(keys, shapes.items(), strict=True)
    }
    cache = {"page_size": config.index_block_size, **options.pop("cache_config", {})}
    return LLM(MiniMaxM3ForCausalLM(config, state), cache_config=cache, **options)
