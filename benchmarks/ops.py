"""The operations as they are timed: which function, its arguments from a case's inputs, and their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import minimax_kernels as mk
from benchmarks.case_data import Inputs, Pool
from benchmarks.cases import BLOCK, HEAD_DIM, TOPK, Case, Heads

SCALE = HEAD_DIM**-0.5
TAKES_OUT = ("attention", "chain")  # these write into a buffer that the caller owns


def function_of(op: str, impl: str | None) -> Callable[..., Any]:
    """The operation through the public API."""

    def score(idx_q, index_cache, batch):
        return mk.index_score(idx_q, index_cache, batch, impl=impl)

    def select(scores, batch):
        return mk.select_blocks(scores, batch, topk=TOPK, impl=impl)

    def index(idx_q, index_cache, batch):
        return select(score(idx_q, index_cache, batch), batch)

    def attention(q, k_cache, v_cache, selected, batch, out):
        return mk.sparse_attention(q, k_cache, v_cache, selected, batch, scale=SCALE, out=out, impl=impl)

    def chain(q, k_cache, v_cache, idx_q, index_cache, batch, out):
        caches = (k_cache, v_cache, idx_q, index_cache)
        return mk.msa(q, *caches, batch, scale=SCALE, topk=TOPK, out=out, impl=impl)

    functions = {"score": score, "select": select, "index": index, "attention": attention, "chain": chain}
    if op not in functions:
        raise ValueError(f"op = {op!r}: must be one of {', '.join(functions)}")
    return functions[op]


def arguments_of(op: str, inputs: Inputs, pool: Pool, scores: Any = None, selected: Any = None) -> tuple:
    """The arguments of one call (without `out`)."""
    if op in ("score", "index"):
        return inputs.idx_q, pool.index_cache, inputs.batch
    if op == "select":
        return scores, inputs.batch
    if op == "attention":
        return inputs.q, pool.k_cache, pool.v_cache, selected, inputs.batch
    return inputs.q, pool.k_cache, pool.v_cache, inputs.idx_q, pool.index_cache, inputs.batch


def shapes_of(op: str, case: Case, heads: Heads, pages: int, cache_dtype: str = "bfloat16") -> tuple[tuple, Any]:
    """(arguments, out or None) of one call as shapes, to compile before any data is there."""
    bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    shape = jax.ShapeDtypeStruct
    tokens, blocks = case.tokens, max(case.blocks)
    batch = mk.Batch(shape((case.batch, blocks), i32), shape((case.batch + 1,), i32), shape((case.batch,), i32))
    caches = (shape((pages, heads.kv, BLOCK, HEAD_DIM), cache_dtype),) * 2
    pool = Pool(*caches, shape((pages, BLOCK, HEAD_DIM), cache_dtype))
    q = shape((tokens, heads.q, HEAD_DIM), bf16)
    inputs = Inputs(q, shape((tokens, heads.index, HEAD_DIM), bf16), batch)
    scores = shape((heads.index, tokens, blocks), f32)
    selected = shape((heads.index, tokens, TOPK), i32)
    return arguments_of(op, inputs, pool, scores, selected), (q if op in TAKES_OUT else None)
