"""The blocks that sparse layers select, in whatever layout a model runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.attention import ReferenceAttend
from minimax_jax.model import SINGLE_DEVICE, abstract_model, merge_model, split_model
from minimax_jax.parallel import Layout
from minimax_jax.parallel.config import AXES
from minimax_kernels import Mxfp8, index_score, select_blocks, write_index


class SelectionRecorder(ReferenceAttend):
    """Keeps the blocks that each index head selects, by layer."""

    def __init__(self, *args: Any, index_split: Any = None):
        super().__init__(*args)
        self.selected: list[Array] = []
        self.index_split = index_split

    def __call__(self, layer_id, q, k, v, idx_q, idx_k):
        if idx_k is not None:
            ranks = 1 if self.index_split is None else self.index_split.size
            pages = jnp.zeros((self.num_pages, self.config.index_block_size // ranks, idx_k.shape[2]), idx_k.dtype)
            topk = self.config.index_topk_blocks
            if self.index_split is None:
                pages = write_index(pages, idx_k, self.slots, impl="reference")
                scores = index_score(idx_q, pages, self.batch, impl="reference")
                selected = select_blocks(scores, self.batch, topk=topk, impl="reference")
            else:
                pages = self.index_split.write(pages, idx_k, self.slots, impl="reference")
                selected = self.index_split.select(idx_q, pages, self.batch, topk=topk, impl="reference")
            self.selected.append(selected)
        return super().__call__(layer_id, q, k, v, idx_q, idx_k)


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
