"""The paged caches of a model: keys, values and index keys of every layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_jax.config import MiniMaxM3Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCaches:
    """Page pools by layer; page p of every pool belongs to the same tokens.

    Attributes:
      k, v: per layer [P, Hkv, B, D].
      index: per layer [P, B, Di], None on dense layers.
    """

    k: tuple[Float[Array, "P Hkv B D"], ...]
    v: tuple[Float[Array, "P Hkv B D"], ...]
    index: tuple[Float[Array, "P B Di"] | None, ...]


def allocate_pages(
    config: MiniMaxM3Config, num_pages: int, dtype: DTypeLike, device: jax.Device | jax.sharding.Sharding | None = None
) -> PagedCaches:
    """Pools of `num_pages` pages of `index_block_size` tokens each, on `device` (None: the default one)."""
    block_size = config.index_block_size
    kv_shape = (num_pages, config.num_key_value_heads, block_size, config.head_dim)
    index_shape = (num_pages, block_size, config.index_head_dim)
    layers = range(config.num_hidden_layers)
    return PagedCaches(
        k=tuple(jnp.zeros(kv_shape, dtype, device=device) for _ in layers),
        v=tuple(jnp.zeros(kv_shape, dtype, device=device) for _ in layers),
        index=tuple(jnp.zeros(index_shape, dtype, device=device) if config.is_sparse(i) else None for i in layers),
    )
