"""Attention without a cache: differentiable unless kernels are asked for, on any device."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_jax.attention.paged import attend_paged, write_paged
from minimax_jax.config import MiniMaxM3Config
from minimax_kernels import packed_batch


class ReferenceAttend:
    """`attend` over the tokens of this call alone.

    Args:
      query_starts: [R + 1] int32, boundaries of the sequences in the flat tokens.
      num_tokens: T, static.
      max_len: static bound of one sequence's length; T when not given.
      impl: which kernels to use; only "reference" is differentiable.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        query_starts: Int[Array, "R+1"],
        num_tokens: int,
        max_len: int | None = None,
        *,
        impl: str | None = "reference",
    ):
        self.config, self.impl = config, impl
        self.batch, self.slots, self.num_pages = packed_batch(
            query_starts, num_tokens, config.index_block_size, num_tokens if max_len is None else max_len
        )

    def __call__(
        self,
        layer_id: int,
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        idx_q: Float[Array, "T Hi Di"] | None,
        idx_k: Float[Array, "T 1 Di"] | None,
    ) -> Float[Array, "T Hq*D"]:
        block_size = self.config.index_block_size
        empty = jnp.zeros((self.num_pages, k.shape[1], block_size, k.shape[2]), k.dtype)
        index_pages = None
        if idx_k is not None:
            index_pages = jnp.zeros((self.num_pages, block_size, idx_k.shape[2]), idx_k.dtype)
        k_pages, v_pages, index_pages = write_paged(empty, empty, index_pages, k, v, idx_k, self.slots, impl=self.impl)
        return attend_paged(self.config, q, k_pages, v_pages, idx_q, index_pages, self.batch, impl=self.impl)
