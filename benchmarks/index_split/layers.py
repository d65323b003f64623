"""Sparse layers' attention over ranks: caches of noise, and both ways to score their index keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from minimax_jax.attention import step_layout
from minimax_jax.attention.paged import attend_paged
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel import ParallelConfig, Ranks
from minimax_jax.parallel.config import HEADS
from minimax_kernels import Batch, index_score, select_blocks

_CACHED_BYTES = 1 << 28  # index keys of all layers together; beyond what stays in a GPU's L2 cache
_FEEDBACK = 1e-3  # of a layer's result in the next one's queries, so that no layer can be left out


@dataclasses.dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
      requests, new, context: each request's new tokens, and its tokens with these.
    """

    requests: int
    new: int
    context: int


class SparseLayers:
    """Attention of some sparse layers of M3 over `tensor` devices, one step's operands in place."""

    def __init__(self, case: Case, tensor: int, *, impl: str | None, most_layers: int):
        config = MiniMaxM3Config.m3()
        self.ranks = Ranks(config, ParallelConfig(tensor, split_index_keys=True))
        self.config, self.impl = self.ranks.layout.local_config, impl
        page, width = config.index_block_size, -(-case.context // config.index_block_size)
        pages = case.requests * width
        held = pages * page * config.index_head_dim * 2
        self.layers = max(2, min(most_layers, -(-_CACHED_BYTES // held)))
        tables = np.random.default_rng(0).permutation(pages).reshape(case.requests, width)
        each = np.ones(case.requests, np.int32)
        layout = step_layout(tables, each * case.new, each * case.context, page)
        self.batch: Any = self._placed(Batch(layout.block_tables, layout.query_starts, layout.kv_lens))  # type: ignore[arg-type]
        tokens, shape = case.requests * case.new, (self.layers, pages, page, config.index_head_dim)
        self.index = self._noise(0, shape, PartitionSpec())
        self.striped = self._striped(self.index, tensor)
        kv_shape = (self.layers, pages, self.config.num_key_value_heads * tensor, page, config.head_dim)
        self.k, self.v = (self._noise(seed, kv_shape, PartitionSpec(None, None, HEADS)) for seed in (1, 2))
        self.q = self._noise(3, (tokens, config.num_attention_heads, config.head_dim), PartitionSpec(None, HEADS))
        sharing = self.config.index_n_heads * tensor // config.index_n_heads
        index_shape = (tokens, config.index_n_heads, config.index_head_dim)
        self.idx_q = self._noise(4, index_shape, PartitionSpec(None, HEADS), repeats=sharing)

    def attend(self, *, split: bool) -> Any:
        """A compiled function without arguments: all layers one after the other."""
        index_split = self.ranks.index_split if split else None

        def rank(q: Array, idx_q: Array, k: Array, v: Array, index: Array, batch: Batch) -> Array:
            def layer(queries: Any, caches: Any) -> Any:
                q, idx_q = queries
                k, v, index = caches
                out = attend_paged(
                    self.config, q, k, v, idx_q, index, batch, index_split=index_split, impl=self.impl
                ).reshape(q.shape)
                changed = idx_q + _FEEDBACK * out[:, : idx_q.shape[1]].astype(idx_q.dtype)
                return (q + _FEEDBACK * out.astype(q.dtype), changed), None

            return jax.lax.scan(layer, (q, idx_q), (k, v, index))[0][0]

        heads, caches = PartitionSpec(None, HEADS), PartitionSpec(None, None, HEADS)
        specs = (heads, heads, caches, caches, caches if split else PartitionSpec(), PartitionSpec())
        index = self.striped if split else self.index
        args = (self.q, self.idx_q, self.k, self.v, index, self.batch)
        compiled = jax.jit(self.ranks.per_rank(rank, specs, heads)).lower(*args).compile()
        return lambda: compiled(*args)

    def different_rows(self) -> float:
        """The share of (head, token) rows of the first layer for which the two ways select different blocks."""
        c, split = self.config, self.ranks.index_split
        assert split is not None
        options: dict[str, Any] = {
            "topk": c.index_topk_blocks, "init_blocks": c.index_init_blocks, "local_blocks": c.index_local_blocks,
            "impl": self.impl,
        }  # fmt: skip

        def rank(idx_q: Array, index: Array, striped: Array, batch: Batch) -> Array:
            whole = select_blocks(index_score(idx_q, index[0], batch, impl=self.impl), batch, **options)
            found = split.select(idx_q, striped[0], batch, **options)
            return jax.lax.pmean((jnp.sort(found) != jnp.sort(whole)).any(axis=-1).mean(), split.axes)

        specs = (PartitionSpec(None, HEADS), PartitionSpec(), PartitionSpec(None, None, HEADS), PartitionSpec())
        run = jax.jit(self.ranks.per_rank(rank, specs, PartitionSpec()))
        return float(run(self.idx_q, self.index, self.striped, self.batch))

    def _placed(self, values: Any) -> Any:
        return self.ranks.place(values, jax.tree.map(lambda _: PartitionSpec(), values))

    def _noise(self, seed: int, shape: tuple[int, ...], spec: PartitionSpec, repeats: int = 1) -> Array:
        def make() -> Array:
            values = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
            return jnp.repeat(values, repeats, axis=1) if repeats > 1 else values

        return jax.jit(make, out_shardings=NamedSharding(self.ranks.mesh, spec))()

    def _striped(self, index: Array, tensor: int) -> Array:
        """The same keys as ranks that share them out hold them."""

        def deal(index: Array) -> Array:
            layers, pages, page, channels = index.shape
            dealt = index.reshape(layers, pages, page // tensor, tensor, channels).swapaxes(2, 3)
            return dealt.reshape(index.shape)

        sharding = NamedSharding(self.ranks.mesh, PartitionSpec(None, None, HEADS))
        return jax.jit(deal, out_shardings=sharding)(index)
