"""Ragged batches whose foreign memory is NaN, in the shapes that the kernels must serve."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from minimax_kernels import Batch


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a case; `dtype` is that of queries, and of caches unless they have their own."""

    q_heads: int
    kv_heads: int
    index_heads: int
    head_dim: int = 128
    block: int = 128
    topk: int = 16
    dtype: str = "bfloat16"
    init: int = 0
    local: int = 1
    cache_dtype: str | None = None

    def __str__(self) -> str:
        extra = "" if self.cache_dtype is None else f" caches {self.cache_dtype}"
        extra += "" if (self.init, self.local) == (0, 1) else f" init{self.init} local{self.local}"
        heads = f"{self.q_heads}/{self.kv_heads}/{self.index_heads}"
        return f"{heads} D{self.head_dim} B{self.block} top{self.topk} {self.dtype}{extra}"

    @property
    def selection_heads(self) -> int:
        """Selections a token has once index heads and KV heads are matched."""
        return max(self.kv_heads, self.index_heads)

    @property
    def options(self) -> dict[str, int]:
        """Of select_blocks and msa."""
        return {"topk": self.topk, "init_blocks": self.init, "local_blocks": self.local}


@dataclasses.dataclass(frozen=True)
class ParityCase:
    """A shape and the lengths of its requests; `padding` rows follow the last token."""

    name: str
    shape: Shape
    query_lens: tuple[int, ...]
    prefix_lens: tuple[int, ...]
    padding: int = 0

    def __str__(self) -> str:
        return f"{self.name} [{self.shape}]"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A case's data; queries of padding rows, pages and rows that no request owns are NaN."""

    case: ParityCase
    batch: Batch
    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    idx_q: jax.Array
    index_cache: jax.Array
    live: np.ndarray  # [T], which rows hold a token
    positions: np.ndarray  # [T], position in the request, 0 in padding rows

    @property
    def scale(self) -> float:
        """Of attention."""
        return self.case.shape.head_dim**-0.5

    def upcast(self) -> Sample:
        """The same numbers in float32."""
        fields = ("q", "k_cache", "v_cache", "idx_q", "index_cache")
        return dataclasses.replace(self, **{name: getattr(self, name).astype(jnp.float32) for name in fields})


def make_sample(case: ParityCase, seed: int, ties: bool = False) -> Sample:
    """Random data: N(0, 1), or index queries and keys of -1, 0, 1, whose scores are exact and full of ties."""
    shape, random = case.shape, np.random.default_rng(seed)
    lens = np.array(case.query_lens)
    kv_lens = lens + np.array(case.prefix_lens)
    blocks = -(-kv_lens // shape.block)
    pages = int(blocks.sum()) + 3
    order = iter(random.permutation(pages))
    # past a request's context a table may hold anything: foreign pages, none, nonsense
    tables = random.choice([-1, 0, pages - 1, 1_000_000_000], (len(lens), max(int(blocks.max()), 1) + 1))
    owned = np.zeros((pages, shape.block), bool)
    for request, length in enumerate(kv_lens):
        for block in range(blocks[request]):
            tables[request, block] = page = next(order)
            owned[page, : length - block * shape.block] = True
    starts = np.concatenate([[0], np.cumsum(lens)])
    rows = int(starts[-1]) + case.padding
    live = np.arange(rows) < starts[-1]
    positions = np.zeros(rows, np.int64)
    for request, start in enumerate(starts[:-1]):
        positions[start : starts[request + 1]] = case.prefix_lens[request] + np.arange(lens[request])

    def poisoned(mask: np.ndarray, *size: int, few: bool = False, dtype: str = shape.dtype) -> jax.Array:
        values = random.integers(-1, 2, size) if few else random.standard_normal(size, np.float32)
        return jnp.asarray(np.where(mask, values, np.float32(np.nan)), dtype)

    cached = shape.cache_dtype or shape.dtype
    cache = (pages, shape.kv_heads, shape.block, shape.head_dim)
    return Sample(
        case=case,
        batch=Batch(*(jnp.asarray(x, jnp.int32) for x in (tables, starts, kv_lens))),
        q=poisoned(live[:, None, None], rows, shape.q_heads, shape.head_dim),
        k_cache=poisoned(owned[:, None, :, None], *cache, dtype=cached),
        v_cache=poisoned(owned[:, None, :, None], *cache, dtype=cached),
        idx_q=poisoned(live[:, None, None], rows, shape.index_heads, shape.head_dim, few=ties),
        index_cache=poisoned(owned[..., None], pages, shape.block, shape.head_dim, few=ties, dtype=cached),
        live=live,
        positions=positions,
    )


def random_selection(sample: Sample, seed: int) -> jax.Array:
    """[S, T, topk]: any blocks of the table that the token's request may hold, any number of them, in any order.

    Blocks after the token's own are among them; they must add nothing.
    """
    shape, random = sample.case.shape, np.random.default_rng(seed)
    rows, blocks = len(sample.live), sample.batch.num_blocks
    keys = random.random((shape.selection_heads, rows, blocks), np.float32)
    request = np.searchsorted(np.asarray(sample.batch.query_starts)[1:], np.arange(rows), side="right")
    request = np.minimum(request, sample.batch.num_requests - 1)
    held = -(-np.asarray(sample.batch.kv_lens)[request] // shape.block)
    keys[:, np.arange(blocks) >= held[:, None]] = 2
    ids = keys.argsort(axis=-1)[..., : shape.topk].astype(np.int32)
    count = random.integers(0, np.minimum(held, shape.topk) + 1, (shape.selection_heads, rows))
    ids = np.where(np.arange(ids.shape[-1]) < count[..., None], ids, -1)
    ids = np.pad(ids, ((0, 0), (0, 0), (0, shape.topk - ids.shape[-1])), constant_values=-1)
    ids[:, ~sample.live] = random.integers(-1, blocks, ids[:, ~sample.live].shape)
    return jnp.asarray(ids)
