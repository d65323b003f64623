"""One tensor-parallel rank's share of MiniMax-M3 with random weights, and ways to run its layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.attention import PagedAttention, TracedAttend, step_layout
from minimax_jax.cache import PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.segmented_prefill import FlatStep, SegmentedPrefill
from minimax_jax.model import abstract_model, merge_model, split_model


def rank_config(layers: int, *, moe: bool, tiny: bool) -> MiniMaxM3Config:
    """A TP8 rank's sizes: 8 query heads, 1 KV head, 1 index head; an MLP 3072 wide, or 16 experts 384 wide.

    The first layer's attention is dense, the others' sparse, as M3's are.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 6144,
        "vocab_size": 25008,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "index_n_heads": 1,
        "dense_intermediate_size": 3072,
        "intermediate_size": 384,
        "shared_intermediate_size": 384,
        "num_local_experts": 16,
    }
    if tiny:
        sizes |= {"hidden_size": 128, "vocab_size": 256, "dense_intermediate_size": 256, "intermediate_size": 64}
        sizes |= {"shared_intermediate_size": 64, "num_local_experts": 4, "head_dim": 32, "rotary_dim": 16}
        sizes |= {"index_head_dim": 32, "index_block_size": 16, "index_topk_blocks": 2}
    return MiniMaxM3Config(
        num_hidden_layers=layers,
        layer_types=("full_attention", *("minimax_m3_sparse",) * (layers - 1)),
        mlp_layer_types=("sparse" if moe else "dense",) * layers,
        **sizes,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key, shape, dtype, scale):
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class RankModel:
    """Weights on the device, a page pool with random contents, and the steps to time.

    Attributes:
      leaves: weights; pool: pages; attention: the executables behind the boundary.
    """

    def __init__(self, config: MiniMaxM3Config, num_pages: int, *, dtype: Any, impl: str | None):
        self.config, self.dtype = config, dtype
        self._graphdef, shapes = split_model(abstract_model(config, dtype))
        self._names = tuple(shapes)
        keys = jax.random.split(jax.random.key(0), len(shapes))
        self.leaves = [
            _random(key, leaf.shape, leaf.dtype, 0.0 if leaf.ndim == 1 else leaf.shape[-2] ** -0.5)
            for key, leaf in zip(keys, shapes.values(), strict=True)
        ]
        self.impl = impl
        self.attention = PagedAttention(config, impl=impl)
        self.num_pages = num_pages
        self.pool = self.new_pool()

    def new_pool(self) -> PagePool:
        """Pages of noise, so that selection has something to choose from."""
        pool = PagePool(self.config, self.num_pages, self.dtype)
        noise = [_random(jax.random.key(i), c.shape, c.dtype, 1.0) for i, c in enumerate(jax.tree.leaves(pool.caches))]
        pool.store(jax.tree.unflatten(jax.tree.structure(pool.caches), noise), pool.epoch.value)
        return pool

    def segments(self, bucket: int, **options: Any) -> SegmentedPrefill:
        """Segments of one bucket; options as `SegmentedPrefill` takes them."""
        given = {"attention": self.attention, **options}
        return SegmentedPrefill(self.config, self._graphdef, self._names, max_tokens=bucket, buckets=(bucket,), **given)

    def whole(self, label: str, compiler_options: Mapping[str, Any] | None = None) -> Any:
        """The same layers as one jit over functional caches, which it is given for good."""

        def run(leaves, caches, tokens, positions, slots, batch):
            attend = TracedAttend(self.config, caches, batch, slots, impl=self.impl)
            model = merge_model(self._graphdef, dict(zip(self._names, leaves, strict=True)))
            return model.run_layers(model.embed(tokens), positions, attend), attend.caches()

        run.__name__ = run.__qualname__ = label
        options = dict(compiler_options) if compiler_options else None
        return jax.jit(run, donate_argnums=1, compiler_options=options)

    def step(self, requests: int, new: int, past: int) -> FlatStep:
        """`requests` requests of `new` tokens after `past` ones, each in pages of its own."""
        block_size = self.config.index_block_size
        pages = -(-(past + new) // block_size)
        if requests * pages > self.num_pages:
            raise ValueError(f"requests = {requests}: need {requests * pages} pages, the pool has {self.num_pages}")
        tables = np.random.default_rng(0).permutation(self.num_pages)[: requests * pages].reshape(requests, pages)
        layout = step_layout(tables, np.full(requests, new), np.full(requests, past + new), block_size)
        tokens = np.random.default_rng(1).integers(0, self.config.vocab_size, requests * new)
        positions = np.tile(np.arange(past, past + new), requests)
        return FlatStep(tokens.astype(np.int32), positions.astype(np.int32), layout)

    def run_segments(self, segments: SegmentedPrefill, step: FlatStep) -> jax.Array:
        """One step through segments, its host-side preparation included."""
        return segments.run_layers(self.leaves, self.pool, step)

    def run_whole(self, whole: Any, step: FlatStep) -> jax.Array:
        """One step as one executable, its host-side preparation included."""
        hidden, caches = whole(*self.whole_arguments(step))
        self.pool.store(caches, self.pool.epoch.value)
        return hidden

    def whole_arguments(self, step: FlatStep) -> tuple[Any, ...]:
        """What a whole step takes; tables and slots as the boundary's, padding included."""
        runtime = self.attention.step(self.pool, step.layout)
        count = len(step.tokens)
        tokens, positions = runtime.send(count, [step.tokens], [step.positions])
        return self.leaves, self.pool.caches, tokens, positions, *runtime.on_device(count)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What to measure.

    Attributes:
      layers: of the model; prefill, decode: tokens of a prefill step, requests of a decode step.
      past: tokens of context before a step.
      repeats: steps in a row; rounds: how often, ways taking turns.
    """

    layers: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    past: int
    repeats: int
    rounds: int

    def pages(self, block_size: int) -> int:
        """Pages that the largest step needs."""
        largest = max(max(self.prefill) + self.past, max(self.decode) * (self.past + block_size))
        return -(-largest // block_size) + 1
