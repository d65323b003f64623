"""What each op must compute and move, and the least time that takes.

Bytes: every input once and every output once, at 2 bytes a channel (bf16; 1 in caches of e4m3), 4 a score or a selected
id; keys and values at most once a request (a perfect kernel shares them among its queries), and no more of them than
its queries can select. FLOPs: scores of whole visible blocks (the block max needs them all); attention over exactly
the visible keys of the selected blocks.
"""

from __future__ import annotations

import dataclasses

from benchmarks.cases import BLOCK, HEAD_DIM, TOPK, Case, Heads
from minimax_jax.rank_slice.attention_work import selected_keys, visible_blocks
from minimax_jax.rank_slice.ceilings import Ceilings

BF16, WORD = 2, 4


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one call."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The floor: whichever of arithmetic and traffic takes longer."""
        return max(self.flops / ceilings.matmul_flop_per_s, self.bytes / ceilings.copy_bytes_per_s)


def score_work(case: Case, heads: Heads, cached: int = BF16) -> Work:
    """index_score; `cached` bytes a channel of a cache."""
    blocks = sum(map(visible_blocks, case.query_lens, case.prefix_lens))
    flops = 2 * heads.index * HEAD_DIM * BLOCK * blocks
    queries = case.tokens * heads.index * HEAD_DIM * BF16
    return Work(flops, queries + index_key_bytes(case, cached) + heads.index * blocks * WORD)


def select_work(case: Case, heads: Heads, cached: int = BF16) -> Work:
    """select_blocks: scores in, ids out; comparisons are not counted."""
    blocks = sum(map(visible_blocks, case.query_lens, case.prefix_lens))
    return Work(0, heads.index * WORD * (blocks + case.tokens * TOPK))


def attention_work(case: Case, heads: Heads, cached: int = BF16) -> Work:
    """sparse_attention."""
    keys = sum(map(selected_keys, case.query_lens, case.prefix_lens))
    flops = 4 * heads.q * HEAD_DIM * keys
    rows = 2 * case.tokens * heads.q * HEAD_DIM * BF16  # q in, the result out
    read = sum(
        min(kv_len, query_len * TOPK * BLOCK) for kv_len, query_len in zip(case.kv_lens, case.query_lens, strict=True)
    )
    return Work(flops, rows + 2 * read * heads.kv * HEAD_DIM * cached)


WORK = {"score": score_work, "select": select_work, "attention": attention_work}
PARTS = {  # the parts of a timed op
    "score": ("score",),
    "select": ("select",),
    "index": ("score", "select"),
    "attention": ("attention",),
    "chain": ("score", "select", "attention"),
}


def index_key_bytes(case: Case, cached: int = BF16) -> int:
    """Index keys of every request, once."""
    return sum(case.kv_lens) * HEAD_DIM * cached


def floor_seconds(op: str, case: Case, heads: Heads, ceilings: Ceilings, cached: int = BF16) -> float:
    """The least time of an op of `benchmarks.cases`; a chain need not write its scores, but scores before attending."""
    score, select, attention = (work(case, heads, cached) for work in (score_work, select_work, attention_work))
    if op == "score":
        return score.seconds(ceilings)
    if op == "select":
        return select.seconds(ceilings)
    if op == "attention":
        return attention.seconds(ceilings)
    queries = case.tokens * heads.index * HEAD_DIM * BF16
    fused = Work(score.flops, queries + index_key_bytes(case, cached)).seconds(ceilings)
    if op == "index":
        return fused
    if op == "chain":
        return fused + attention.seconds(ceilings)
    raise ValueError(f"op = {op!r}: must be score, select, index, attention or chain")
