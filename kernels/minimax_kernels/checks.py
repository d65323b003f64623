"""Argument checks that the operations share; each error names the argument and what is allowed."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minimax_kernels.batch import Batch
from minimax_kernels.cache_types import FP8

FLOATS = ("float32", "bfloat16", "float16")
CACHE_TYPES = (*FLOATS, FP8)


def check_rank(name: str, x: Any, shape: str) -> None:
    """`shape` is a spelled-out shape such as "[T, Hq, D]"."""
    if x.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {shape}")


def check_extent(name: str, axis: str, found: int, expected: int, source: str) -> None:
    """One axis of `name` against what another argument says it must be."""
    if found != expected:
        raise ValueError(f"{name} has {axis} = {found}: must be {expected}, as {source}")


def check_float(name: str, x: jax.Array) -> None:
    """Attention operands are float32, bfloat16 or float16."""
    if str(x.dtype) not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}: must be one of {', '.join(FLOATS)}")


def check_cache(name: str, x: jax.Array) -> None:
    """Caches may be e4m3 as well."""
    if str(x.dtype) not in CACHE_TYPES:
        raise ValueError(f"{name} is {x.dtype}: must be one of {', '.join(CACHE_TYPES)}")


def check_pair(k_cache: jax.Array, v_cache: jax.Array) -> None:
    """Keys and values lie in caches of one shape and type."""
    check_rank("k_cache", k_cache, "[P, Hkv, B, D]")
    check_cache("k_cache", k_cache)
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache has shape {v_cache.shape}: must be {k_cache.shape}, as k_cache")
    if v_cache.dtype != k_cache.dtype:
        raise ValueError(f"v_cache is {v_cache.dtype}: must be {k_cache.dtype}, as k_cache")


def check_positive(name: str, value: int, least: int = 1) -> None:
    """An integer option of an operation."""
    try:
        index = operator.index(value)
    except TypeError:
        index = least - 1
    if index < least:
        raise ValueError(f"{name} = {value!r}: must be an integer >= {least}")


def check_scale(scale: Any) -> float:
    """The factor of q.k, as a Python number."""
    if isinstance(scale, jax.core.Tracer):
        raise ValueError("scale is a traced value: must be a number that is known while tracing")
    number = float(scale)
    if not 0 < number < math.inf:
        raise ValueError(f"scale = {scale!r}: must be a positive number")
    return number


def check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Head counts that must divide."""
    if divisor < 1 or value % divisor:
        raise ValueError(f"{name} = {value}: must be a multiple of {divisor_name} = {divisor}")


def check_selection(topk: int, init_blocks: int, local_blocks: int) -> None:
    """The options of block selection."""
    check_positive("topk", topk)
    check_positive("init_blocks", init_blocks, 0)
    check_positive("local_blocks", local_blocks, 0)
    if init_blocks + local_blocks > topk:
        raise ValueError(
            f"topk = {topk}: must be at least init_blocks + local_blocks = {init_blocks + local_blocks}, "
            "which count inside it"
        )


def check_int(name: str, x: jax.Array) -> None:
    """Tables, lengths and selections are integers."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} is {x.dtype}: must be an integer type")


def check_batch(batch: Batch, block_size: int | None = None) -> None:
    """Ranks, types and sizes of a batch; the lengths too when they are at hand (not inside a trace)."""
    if not isinstance(batch, Batch):
        raise ValueError(f"batch is {type(batch).__name__}: must be a minimax_kernels.Batch")
    check_rank("batch.block_tables", batch.block_tables, "[R, N]")
    check_rank("batch.query_starts", batch.query_starts, "[R + 1]")
    check_rank("batch.kv_lens", batch.kv_lens, "[R]")
    for field in ("block_tables", "query_starts", "kv_lens"):
        check_int(f"batch.{field}", getattr(batch, field))
    requests = batch.kv_lens.shape[0]
    check_extent("batch.block_tables", "R", batch.block_tables.shape[0], requests, "in batch.kv_lens")
    check_extent("batch.query_starts", "R + 1", batch.query_starts.shape[0], requests + 1, "batch.kv_lens says")
    if requests and block_size is not None and not isinstance(batch.kv_lens, jax.core.Tracer):
        longest = int(np.asarray(batch.kv_lens).max())  # jnp's max of a constant would be a tracer inside a trace
        if longest > batch.num_blocks * block_size:
            raise ValueError(
                f"batch.kv_lens has {longest} tokens: must be at most {batch.num_blocks * block_size}, "
                f"what batch.block_tables of {batch.num_blocks} pages of {block_size} tokens hold"
            )


def check_attention(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, batch: Batch, out: jax.Array | None) -> None:
    """What dense and sparse attention ask of their operands."""
    check_rank("q", q, "[T, Hq, D]")
    check_float("q", q)
    check_pair(k_cache, v_cache)
    check_extent("q", "D", q.shape[2], k_cache.shape[3], "in k_cache")
    check_multiple("q's Hq", q.shape[1], "k_cache's Hkv", k_cache.shape[1])
    check_batch(batch, k_cache.shape[2])
    if out is not None:
        check_float("out", out)
        if out.shape != q.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}: must be {tuple(q.shape)}, as q")
