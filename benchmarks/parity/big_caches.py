"""Caches of more than 2 and 4 GiB: writes and reads at both ends and in the middle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import minimax_kernels as mk
from benchmarks.parity import compare
from benchmarks.parity.compare import Mismatch, Result, require

GIB = 1 << 30
BLOCK, DIM, KV_HEADS, TOPK = 128, 128, 4, 16
BLOCKS = 40  # pages in use, a third of them at each end and in the middle


def check(
    impl: str, ops: Sequence[str], say: Callable[[str], None], sizes: Sequence[float] = (2.3, 4.6)
) -> list[Result]:
    """Each size of cache (GiB) with each operation; a refused write is done by the reference."""
    results = []
    for gib in sizes:
        results += _check_size(impl, ops, gib)
        say(f"caches of {gib} GiB: " + ", ".join(f"{r.op} {r.status}" for r in results if f"{gib} GiB" in r.case))
    return results


def _check_size(impl: str, ops: Sequence[str], gib: float) -> list[Result]:
    results: list[Result] = []
    random = np.random.default_rng(6)
    page_bytes = KV_HEADS * BLOCK * DIM * 2
    pages, index_pages = (int(gib * GIB / size) + 1 for size in (page_bytes, BLOCK * DIM * 2))
    kv_order, index_order = (_pages_in_use(random, count) for count in (pages, index_pages))
    lens = (BLOCKS * BLOCK - 5,)
    rows = lens[0]
    k, v = (jnp.asarray(random.standard_normal((rows, KV_HEADS, DIM), np.float32), jnp.bfloat16) for _ in "kv")
    keys = jnp.asarray(random.standard_normal((rows, 1, DIM), np.float32), jnp.bfloat16)

    def attempt(op: str, check: Callable[[], dict[str, float]]) -> None:
        name = f"cache of {gib} GiB"
        try:
            results.append(Result(op, name, "both ends and the middle", "ok", errors=check()))
        except Mismatch as mismatch:
            results.append(Result(op, name, "both ends and the middle", "FAILED", str(mismatch)))
        except NotImplementedError as refusal:
            results.append(Result(op, name, "both ends and the middle", "refused", str(refusal)))
        except Exception as error:  # noqa: BLE001 out of memory must not hide the others
            text = f"{type(error).__name__}: {str(error)[:600]}"
            results.append(Result(op, name, "both ends and the middle", "FAILED", text))

    # keys and values
    if {"write_kv", "sparse_attention", "dense_attention"} & set(ops):
        caches = tuple(jnp.full((pages, KV_HEADS, BLOCK, DIM), jnp.nan, jnp.bfloat16) for _ in "kv")
        caches = _write("write_kv", impl, caches, (k, v, _slots(kv_order, rows)), kv_order, attempt, "write_kv" in ops)
        small = tuple(cache[kv_order] for cache in caches)
        for op in ("sparse_attention", "dense_attention"):
            if op in ops:
                attempt(op, functools.partial(_read_kv, op, impl, caches, small, kv_order, rows))
        del caches, small
    # index keys
    if {"write_index", "index_score"} & set(ops):
        index = (jnp.full((index_pages, BLOCK, DIM), jnp.nan, jnp.bfloat16),)
        slots = _slots(index_order, rows)
        index = _write("write_index", impl, index, (keys, slots), index_order, attempt, "write_index" in ops)
        if "index_score" in ops:
            attempt(
                "index_score", functools.partial(_read_index, impl, index[0], index[0][index_order], index_order, rows)
            )
    return results


def _pages_in_use(random: np.random.Generator, pages: int) -> np.ndarray:
    third = BLOCKS // 3
    middle = pages // 2 + np.arange(BLOCKS - 2 * third)
    return random.permutation(np.concatenate([np.arange(third), middle, pages - 1 - np.arange(third)])).astype(np.int32)


def _slots(order: np.ndarray, rows: int) -> jax.Array:
    position = np.arange(rows)
    return jnp.asarray(order[position // BLOCK].astype(np.int64) * BLOCK + position % BLOCK, jnp.int32)


def _write(op: str, impl: str, caches: tuple, args: tuple, order: np.ndarray, attempt: Any, wanted: bool) -> tuple:
    """Writes in place and checks the pages; by the reference where the implementation fails or is not asked for."""
    kept = [caches]

    def call(name: str) -> None:
        donating = jax.jit(functools.partial(getattr(mk, op), impl=name), donate_argnums=tuple(range(len(caches))))
        pointers = [cache.unsafe_buffer_pointer() for cache in kept[0]]
        results = donating(*kept[0], *args)
        kept[0] = results if isinstance(results, tuple) else (results,)
        for result, value, pointer in zip(kept[0], args, pointers, strict=False):
            require(result.unsafe_buffer_pointer() == pointer, "the cache moved: not written in place")
            pages = np.asarray(result[order])
            if pages.ndim == 4:
                pages = pages.swapaxes(1, 2)
            rows = pages.reshape(-1, *value.shape[1:] if pages.ndim == 4 else (1, DIM))
            require(compare.bit_equal(rows[: value.shape[0]], value), "pages do not hold what was written")
            require(bool(np.isnan(rows[value.shape[0] :]).all()), "rows of no slot were written")

    def check() -> dict[str, float]:
        call(impl)
        return {}

    if wanted:
        attempt(op, check)
    if not wanted or not _holds_data(kept[0], order):
        kept[0] = tuple(jnp.full(cache.shape, jnp.nan, cache.dtype) for cache in caches)
        call("reference")
    return kept[0]


def _holds_data(caches: tuple, order: np.ndarray) -> bool:
    """Whether a write took place at all."""
    return not any(cache.is_deleted() or np.isnan(np.asarray(cache[order[0]])).all() for cache in caches)


def _queries(rows: int, heads: int) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Twelve decode tokens: of one request each, at lengths over the whole context."""
    random = np.random.default_rng(8)
    lens = np.linspace(1, rows, 12).astype(np.int32)
    q = random.standard_normal((12, heads, DIM), np.float32)
    return jnp.asarray(q, jnp.bfloat16), lens, np.arange(13, dtype=np.int32)


def _batches(order: np.ndarray, lens: np.ndarray, starts: np.ndarray) -> tuple[mk.Batch, mk.Batch]:
    """The batch over the big cache, and over a small one that holds its pages in order."""

    def batch(table: np.ndarray) -> mk.Batch:
        return mk.Batch(jnp.asarray(np.tile(table, (len(lens), 1))), jnp.asarray(starts), jnp.asarray(lens))

    return batch(order), batch(np.arange(len(order), dtype=np.int32))


def _read_kv(op: str, impl: str, caches: tuple, small: tuple, order: np.ndarray, rows: int) -> dict[str, float]:
    q, lens, starts = _queries(rows, 64)
    big_batch, small_batch = _batches(order, lens, starts)
    random = np.random.default_rng(9)
    extra: tuple = ()
    if op == "sparse_attention":
        chosen = np.stack([random.permutation(BLOCKS)[:TOPK] for _ in range(KV_HEADS * len(lens))])
        extra = (jnp.asarray(chosen.reshape(KV_HEADS, len(lens), TOPK), jnp.int32),)

    def run(name: str, x: Any, pages: tuple, batch: mk.Batch) -> np.ndarray:
        function = functools.partial(getattr(mk, op), scale=DIM**-0.5, impl=name)
        return compare.as_float(jax.jit(function)(x, *pages, *extra, batch))

    wide = tuple(cache.astype(jnp.float32) for cache in small)
    expected = run("reference", q.astype(jnp.float32), wide, small_batch)
    return compare.attention_errors(run(impl, q, caches, big_batch), expected, np.ones(len(lens), bool))


def _read_index(impl: str, index: jax.Array, small: jax.Array, order: np.ndarray, rows: int) -> dict[str, float]:
    q, lens, starts = _queries(rows, 4)
    big_batch, small_batch = _batches(order, lens, starts)
    run = [jax.jit(functools.partial(mk.index_score, impl=name)) for name in (impl, "reference")]
    scores = np.asarray(run[0](q, index, big_batch))
    expected = np.asarray(run[1](q.astype(jnp.float32), small.astype(jnp.float32), small_batch))
    return compare.score_errors(scores, expected)
