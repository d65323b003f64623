"""The paged caches of a model: keys, values and index keys of every layer."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

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


@dataclasses.dataclass(frozen=True)
class CachePlacement:
    """Pools that are spread over a mesh.

    Attributes:
      kv, index: how [P, Hkv, B, D] and [P, B, Di] are sharded.
      kv_heads: Hkv of the global arrays, in which a head that several ranks have stands several times.
      groups: of ranks with pages of their own, which lie one after the other on axis 0.
    """

    kv: jax.sharding.Sharding
    index: jax.sharding.Sharding
    kv_heads: int
    groups: int


Place: TypeAlias = jax.Device | jax.sharding.Sharding | CachePlacement | None


def allocate_pages(config: MiniMaxM3Config, num_pages: int, dtype: DTypeLike, device: Place = None) -> PagedCaches:
    """Pools of `num_pages` pages of `index_block_size` tokens each, on `device` (None: the default one)."""
    block_size, kv_heads = config.index_block_size, config.num_key_value_heads
    kv: Any = device
    index: Any = device
    if isinstance(device, CachePlacement):
        num_pages, kv_heads, kv, index = num_pages * device.groups, device.kv_heads, device.kv, device.index
    kv_shape = (num_pages, kv_heads, block_size, config.head_dim)
    index_shape = (num_pages, block_size, config.index_head_dim)
    layers = range(config.num_hidden_layers)
    return PagedCaches(
        k=tuple(jnp.zeros(kv_shape, dtype, device=kv) for _ in layers),
        v=tuple(jnp.zeros(kv_shape, dtype, device=kv) for _ in layers),
        index=tuple(jnp.zeros(index_shape, dtype, device=index) if config.is_sparse(i) else None for i in layers),
    )
