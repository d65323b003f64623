"""Random inputs of a case on the device: pools of pages, block tables over permuted pages, queries.

Everything is random, bf16 or, in caches, e4m3; keys, values and queries are independent N(0, 1). Index queries are an
AR(1) process along the tokens, y_t = rho * y_(t-1) + sqrt(1 - rho^2) * x_t with x ~ N(0, 1) per head and channel, and
y_(-1) = 0: at rho 0 neighbouring queries select unrelated blocks, at 0.99 nearly the same ones. Requests of one batch
follow one another in one run of that process. The baselines' own `union8` says that they started from zero: 182 tokens
at TP1 give 32.2 and 33.3 (two seeds) from zero, 29.0 and 28.9 from N(0, 1), and the baseline has 33.8; 1623 tokens give
29.0 and 29.1 from zero, 28.6 and 28.6 from N(0, 1), and the baseline has 29.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import BLOCK, HEAD_DIM, Case, Heads
from minimax_kernels import Batch

CHUNK_PAGES = 64
MOST_SETS = 64
MOST_UNION_TOKENS = 20_000  # tokens up to which the union of neighbours is counted
ROTATED_BYTES = 128 << 20  # what a round of calls touches: well over the 50 MB of L2


@dataclasses.dataclass(frozen=True)
class Pool:
    """The caches of one layer, full of random data."""

    k_cache: jax.Array
    v_cache: jax.Array
    index_cache: jax.Array

    @property
    def pages(self) -> int:
        """P."""
        return self.index_cache.shape[0]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set of inputs of a case; the pool is shared by the sets, whose pages are disjoint."""

    q: jax.Array
    idx_q: jax.Array
    batch: Batch


def touched_bytes(case: Case, heads: Heads, cached: int = 2) -> int:
    """Roughly what one chain reads, `cached` bytes a channel: index keys, and keys and values that can be selected."""
    keys = sum(min(kv, 2048 * n) for kv, n in zip(case.kv_lens, case.query_lens, strict=True))
    return (sum(case.kv_lens) + 2 * keys * heads.kv) * HEAD_DIM * cached


def sets_for(case: Case, heads: Heads, cached: int = 2) -> int:
    """How many sets of inputs a case rotates through, so that none finds its data in L2."""
    return max(1, min(MOST_SETS, -(-ROTATED_BYTES // touched_bytes(case, heads, cached))))


def pool_pages(case: Case, sets: int) -> int:
    """Pages for `sets` sets, rounded up to one of few sizes (2^k and 3 * 2^(k-1)) so that cases share pools."""
    need = sum(case.blocks) * sets
    power = 1 << max(need - 1, CHUNK_PAGES - 1).bit_length()
    return power * 3 // 4 if need <= power * 3 // 4 and power * 3 // 4 % CHUNK_PAGES == 0 else power


def pool_bytes(pages: int, heads: Heads, cached: int = 2) -> int:
    """Memory of a pool."""
    return pages * BLOCK * HEAD_DIM * cached * (2 * heads.kv + 1)


def make_pool(pages: int, heads: Heads, seed: int = 0, dtype: str = "bfloat16") -> Pool:
    """Fills caches with N(0, 1), a few pages at a time: no copy in float32 of the whole."""
    sizes = ((heads.kv, BLOCK, HEAD_DIM),) * 2 + ((BLOCK, HEAD_DIM),)
    return Pool(*(_normal_pages(_key(seed + i), pages, size, dtype) for i, size in enumerate(sizes)))


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="rbg")  # the device's own generator: several times threefry's speed


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal_pages(key: jax.Array, pages: int, page_shape: tuple[int, ...], dtype: str) -> jax.Array:
    def fill(i, cache):
        chunk = jax.random.normal(jax.random.fold_in(key, i), (CHUNK_PAGES, *page_shape), jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(cache, chunk.astype(dtype), i * CHUNK_PAGES, 0)

    return jax.lax.fori_loop(0, pages // CHUNK_PAGES, fill, jnp.zeros((pages, *page_shape), dtype))


@functools.partial(jax.jit, static_argnums=(1,))
def ar1(key: jax.Array, shape: tuple[int, int, int], rho: float) -> jax.Array:
    """[tokens, heads, channels] float32 of the AR(1) process."""
    noise = jax.random.normal(key, shape, jnp.float32)
    scaled = noise * jnp.sqrt(1 - jnp.square(rho))
    decay = jnp.full((shape[0], 1, 1), rho, jnp.float32)

    def combine(left, right):
        return left[0] * right[0], right[1] + right[0] * left[1]

    return jax.lax.associative_scan(combine, (decay, scaled))[1]


class Queries:
    """Random queries, generated once and cut for every case: on the host, so that no cut is compiled."""

    def __init__(self, heads: Heads, tokens: int, seed: int = 100):
        """`tokens`: the most that any case needs."""
        self.heads, self.tokens, self.seed = heads, tokens, seed
        self._index: dict[float, np.ndarray] = {}
        self._q: np.ndarray | None = None

    def q(self, start: int, count: int) -> jax.Array:
        """[count, Hq, D] from row `start`, wrapped around."""
        if self._q is None:
            shape = (self.tokens, self.heads.q, HEAD_DIM)
            self._q = np.asarray(jax.random.normal(_key(self.seed), shape, jnp.bfloat16))
        return jax.device_put(self._cut(self._q, start, count))

    def index(self, rho: float, count: int) -> jax.Array:
        """`index_rows` on the device."""
        return jax.device_put(self.index_rows(rho, count))

    def index_rows(self, rho: float, count: int) -> np.ndarray:
        """[count, Hi, D] of the AR(1) process from its start, on the host."""
        if rho not in self._index:
            shape = (self.tokens, self.heads.index, HEAD_DIM)
            self._index[rho] = np.asarray(ar1(_key(self.seed + 1), shape, rho).astype(jnp.bfloat16))
        return self._cut(self._index[rho], 0, count)

    def _cut(self, rows: np.ndarray, start: int, count: int) -> np.ndarray:
        if count > self.tokens:
            raise ValueError(f"count = {count}: must be at most tokens = {self.tokens}")
        start = min(start % self.tokens, self.tokens - count)
        return rows[start : start + count]


def make_tables(case: Case, pages: int, sets: int, seed: int) -> Iterator[np.ndarray]:
    """`sets` block tables [R, N] over disjoint, randomly permuted pages; what is past a request's end is foreign."""
    per_set = sum(case.blocks)
    if per_set * sets > pages:
        raise ValueError(f"sets = {sets}: {case.name} needs {per_set} pages a set and the pool has {pages}")
    random = np.random.default_rng(seed)
    for own in random.permutation(pages)[: per_set * sets].astype(np.int32).reshape(sets, per_set):
        tables = random.integers(0, pages, (case.batch, max(case.blocks))).astype(np.int32)
        for row, part in zip(tables, np.split(own, np.cumsum(case.blocks)[:-1]), strict=True):
            row[: len(part)] = part
        yield tables


def make_inputs(case: Case, pool: Pool, queries: Queries, rho: float, sets: int, seed: int = 7) -> list[Inputs]:
    """`sets` sets of inputs over disjoint, randomly permuted pages of the pool."""
    starts = jnp.asarray(np.cumsum([0, *case.query_lens]), jnp.int32)
    kv_lens = jnp.asarray(case.kv_lens, jnp.int32)
    made = []
    for number, tables in enumerate(make_tables(case, pool.pages, sets, seed)):
        batch = Batch(jnp.asarray(tables), starts, kv_lens)
        q = queries.q(number * case.tokens, case.tokens)
        made.append(Inputs(q, queries.index(rho, case.tokens), batch))  # other index keys: other selections
    return made


def union_of_neighbours(selected: np.ndarray, query_lens: tuple[int, ...], tile: int = 8) -> float:
    """Mean distinct blocks of `tile` neighbouring queries of a request; `selected` is [heads, T, topk]."""
    counts = []
    start = 0
    for length in query_lens:
        rows = selected[:, start : start + length // tile * tile]
        tiles = rows.reshape(-1, tile * rows.shape[2])
        counts += [len(np.unique(own[own >= 0])) for own in tiles]
        start += length
    return float(np.mean(counts)) if counts else math.nan
