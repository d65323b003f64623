"""The blocks that sparse layers select, in whatever layout a model runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.attention import ReferenceAttend
from minimax_jax.attention.paged import attend_paged, write_paged
from minimax_jax.model import SINGLE_DEVICE, abstract_model, merge_model, split_model
from minimax_jax.parallel import IndexSplit, Layout
from minimax_jax.parallel.config import AXES
from minimax_kernels import Mxfp8, index_score, select_blocks


class SelectionRecorder(ReferenceAttend):
    """Keeps the blocks that each index head selects, by layer: those that it then attends to.

    Args:
      index_split: what shares out the index keys; None where every rank has them all.
    """

    def __init__(self, *args: Any, index_split: IndexSplit | None = None):
        super().__init__(*args)
        self.selected: list[Array] = []
        self.index_split = index_split

    def __call__(self, layer_id, q, k, v, idx_q, idx_k):
        if idx_k is None:
            return super().__call__(layer_id, q, k, v, idx_q, idx_k)
        block_size = self.config.index_block_size
        keys = block_size // (1 if self.index_split is None else self.index_split.size)
        empty = jnp.zeros((self.num_pages, k.shape[1], block_size, k.shape[2]), k.dtype)
        pages = write_paged(
            empty, empty, jnp.zeros((self.num_pages, keys, idx_k.shape[2]), idx_k.dtype), k, v, idx_k, self.slots,
            index_split=self.index_split, impl=self.impl,
        )  # fmt: skip
        k_pages, v_pages, index_pages = pages
        own: Any = self  # selects in the place of an `IndexSplit`
        return attend_paged(
            self.config, q, k_pages, v_pages, idx_q, index_pages, self.batch, index_split=own, impl=self.impl
        )

    def select(self, idx_q, index_cache, batch, *, impl, **options):
        if self.index_split is None:
            selected = select_blocks(index_score(idx_q, index_cache, batch, impl=impl), batch, **options, impl=impl)
        else:
            selected = self.index_split.select(idx_q, index_cache, batch, **options, impl=impl)
        self.selected.append(selected)
        return selected


def selections(model: MiniMaxM3ForCausalLM, tokens: list[int]) -> list[np.ndarray]:
    """[index heads of all ranks, T, topk] of every sparse layer, of one prompt that every data rank is given."""
    ranks, count = model.ranks, len(tokens)
    config = model.config if ranks is None else ranks.layout.local_config
    graphdef, shapes = split_model(abstract_model(config, model.leaves[0].dtype))
    names, comm = tuple(shapes), SINGLE_DEVICE if ranks is None else ranks.comm

    def run(leaves, tokens):
        split = None if ranks is None else ranks.index_split
        attend = SelectionRecorder(config, jnp.array([0, count]), count, index_split=split)
        merged = merge_model(graphdef, dict(zip(names, leaves, strict=True)))
        merged.run_layers(merged.embed(tokens, comm), jnp.arange(count), attend, comm)
        return attend.selected

    if ranks is not None:
        every, none = jax.sharding.PartitionSpec(AXES), jax.sharding.PartitionSpec()
        quantized = {name for name, leaf in zip(names, model.leaves, strict=True) if isinstance(leaf, Mxfp8)}
        run = ranks.per_rank(run, (ranks.weight_specs(names, quantized), none), every)
    return [np.asarray(layer) for layer in jax.jit(run)(model.leaves, jnp.asarray(tokens, jnp.int32))]


def different_rows(expected: list[np.ndarray], found: list[np.ndarray], layout: Layout) -> int:
    """(head, token) rows of all ranks and layers in which the ranks select other blocks than one device.

    Args:
      expected, found: `selections` of one device, of the ranks.
    """
    heads = np.arange(layout.config.index_n_heads)
    sparse = next(i for i in range(layout.config.num_hidden_layers) if layout.config.is_sparse(i))
    splits = layout.splits(f"layers.{sparse}.self_attn.index_q_proj")
    different = 0
    for whole, of_ranks in zip(expected, found, strict=True):
        for rank, part in enumerate(np.split(of_ranks, layout.parallel.num_devices)):
            own = layout.take(heads[None], splits, rank)[0]
            different += int((part != whole[own]).any(axis=-1).sum())
    return different
