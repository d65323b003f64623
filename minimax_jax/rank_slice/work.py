"""What one rank has to compute and read in a step, from the configuration: FLOPs and bytes by kind of kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from minimax_jax.parallel import Layout
from minimax_jax.rank_slice.attention_work import causal_keys, selected_keys, visible_blocks
from minimax_jax.rank_slice.cases import Case
from minimax_jax.rank_slice.ceilings import Ceilings
from minimax_jax.tensor_table import MXFP8_BLOCK


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs, and bytes of weights and caches, each read or written once."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)

    def seconds(self, ceilings: Ceilings) -> float:
        """The floor: whichever of arithmetic and traffic takes longer."""
        return max(self.flops / ceilings.matmul_flop_per_s, self.bytes / ceilings.copy_bytes_per_s)


def step_work(
    layout: Layout,
    case: Case,
    *,
    weights: str,
    experts_load: Mapping[int, Sequence[float]] | None = None,
    cache_itemsize: int = 2,
) -> dict[str, Work]:
    """One step of one rank, by class of kernel (`kernel_classes.CLASSES`).

    Activations between kernels, scores of blocks among them, are not counted: a perfect step keeps them on the chip.
    So selection, which compares, has no work here.

    Args:
      weights: "mxfp8" or "bf16".
      experts_load: by layer, of all choices of experts, the shares of this rank's (`routing_load`); None for even ones.
      cache_itemsize: bytes of a cached number.
    """
    config, local = layout.config, layout.local_config
    tokens, queries, prefix = case.tokens, case.query_len, case.context
    hidden, dim, heads = config.hidden_size, config.head_dim, local.num_attention_heads
    kv_heads, index_heads, index_dim = local.num_key_value_heads, local.index_n_heads, config.index_head_dim
    end = prefix + queries

    def linear(inputs: int, outputs: int, *, itemsize: float | None = None) -> Work:
        size = (1 + 1 / MXFP8_BLOCK if weights == "mxfp8" else 2) if itemsize is None else itemsize
        return Work(2 * tokens * inputs * outputs, inputs * outputs * size)

    def gated(width: int) -> Work:
        return linear(hidden, 2 * width) + linear(width, hidden)

    projections = linear(hidden, (heads + 2 * kv_heads) * dim) + linear(heads * dim, hidden)
    block, topk = config.index_block_size, config.index_topk_blocks
    read_keys = min(end, queries * topk * block)
    sparse = {
        "matmul": projections + linear(hidden, (index_heads + 1) * index_dim),
        "score": Work(
            2 * index_heads * index_dim * block * visible_blocks(queries, prefix, block),
            end * index_dim * cache_itemsize,
        )
        * case.batch,
        "attend": Work(
            4 * heads * dim * selected_keys(queries, prefix, topk, block),
            2 * read_keys * kv_heads * dim * cache_itemsize,
        )
        * case.batch,
        "write": Work(0, tokens * (2 * kv_heads * dim + index_dim) * cache_itemsize),
    }
    dense = {
        "matmul": projections,
        "attend": Work(4 * heads * dim * causal_keys(queries, prefix), 2 * end * kv_heads * dim * cache_itemsize)
        * case.batch,
        "write": Work(0, tokens * 2 * kv_heads * dim * cache_itemsize),
    }
    per_token = config.num_experts_per_tok
    even = [1 / config.num_local_experts] * layout.experts_per_rank
    expert = 3 * hidden * local.intermediate_size

    def routed(load: Sequence[float]) -> Work:
        # tokens choose alone: an expert is read unless none of them wants it
        held = sum(1 - (1 - min(1.0, per_token * share)) ** tokens for share in load)
        rows = tokens * per_token * sum(load)
        return Work(2 * rows * expert, held * expert * (1 + 1 / MXFP8_BLOCK if weights == "mxfp8" else 2))

    beside = gated(local.shared_intermediate_size) + linear(hidden, config.num_local_experts, itemsize=4)
    mlp = {"matmul": gated(local.dense_intermediate_size)}
    # only the last token of a request gets logits
    head = Work(2 * case.batch * hidden * local.vocab_size, hidden * local.vocab_size * 2)
    total: dict[str, Work] = {"head": head}
    for layer in range(config.num_hidden_layers):
        _add(total, sparse if config.is_sparse(layer) else dense)
        if config.is_moe(layer):
            load = even if experts_load is None else experts_load[layer]
            _add(total, {"experts": routed(load), "matmul": beside})
        else:
            _add(total, mlp)
    return total


def whole(parts: Mapping[str, Work]) -> Work:
    """All classes together."""
    return sum(parts.values(), Work())


def _add(total: dict[str, Work], parts: Mapping[str, Work]) -> None:
    for name, work in parts.items():
        total[name] = total.get(name, Work()) + work
