"""The operations spelled out in NumPy, float64, one token at a time; and random ragged batches with poisoned pages.

Slow and plain on purpose: what every implementation of an operation is held against.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from minimax_kernels import Batch


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes; few of them are used, so that few executables are compiled."""

    T: int  # flat rows, padding included
    R: int
    N: int  # pages a request
    B: int
    Hq: int
    Hkv: int
    Hi: int
    topk: int
    D: int = 8
    init: int = 0
    local: int = 1

    @property
    def P(self) -> int:
        return self.R * self.N + 2


SHAPES = {
    "mixed": Shape(T=40, R=4, N=5, B=16, Hq=4, Hkv=2, Hi=2, topk=2),
    "one request": Shape(T=70, R=1, N=6, B=16, Hq=4, Hkv=1, Hi=1, topk=3, local=2),
    "decode": Shape(T=5, R=5, N=7, B=16, Hq=8, Hkv=4, Hi=4, topk=3, init=1),
    "index head for two kv heads": Shape(T=24, R=3, N=4, B=16, Hq=4, Hkv=2, Hi=1, topk=1),
    "two index heads a kv head": Shape(T=24, R=3, N=5, B=16, Hq=8, Hkv=2, Hi=4, topk=4, init=1, local=2),
    "big pages": Shape(T=20, R=3, N=3, B=128, Hq=4, Hkv=2, Hi=2, topk=2),
    "more topk than blocks, no local": Shape(T=24, R=2, N=3, B=16, Hq=2, Hkv=2, Hi=2, topk=7, local=0),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A batch and what lies in its pages; everything that no request owns is NaN."""

    shape: Shape
    tables: np.ndarray
    starts: np.ndarray
    kv_lens: np.ndarray
    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    idx_q: np.ndarray
    index_cache: np.ndarray

    @property
    def batch(self) -> Batch:
        return Batch(*(jnp.asarray(x, jnp.int32) for x in (self.tables, self.starts, self.kv_lens)))

    @property
    def live(self) -> np.ndarray:
        """[T], which rows belong to a request."""
        return np.arange(self.shape.T) < self.starts[-1]

    def rows(self) -> list[tuple[int, int, int]]:
        """(row, request, position) of every live row."""
        found = []
        for request in range(self.shape.R):
            begin, end = self.starts[request], self.starts[request + 1]
            past = int(self.kv_lens[request]) - int(end - begin)
            found.extend((row, request, past + row - int(begin)) for row in range(begin, end))
        return found

    def slot(self, request: int, position: int) -> tuple[int, int]:
        """(page, offset) of a token."""
        return int(self.tables[request, position // self.shape.B]), position % self.shape.B

    def keys(self, cache: np.ndarray, request: int, end: int) -> np.ndarray:
        """[end, ...]: what `cache` [P, B, ...] holds of a request before position `end`, in float64."""
        return np.array([cache[self.slot(request, position)] for position in range(end)], np.float64)


@st.composite
def samples(draw: Any, shape: Shape, ties: bool = False) -> Sample:
    """A ragged batch: empty requests, cached prefixes, lengths at block edges, padding rows, permuted pages."""
    capacity = shape.N * shape.B
    edges = st.sampled_from([0, 1, shape.B - 1, shape.B, shape.B + 1, 2 * shape.B, capacity - shape.B, capacity - 1])
    lens, left = [], shape.T
    for _ in range(shape.R):
        if draw(st.booleans()) and shape.T > shape.R:
            lens.append(min(left, draw(edges)))
        else:
            lens.append(min(left, draw(st.integers(0, min(2, left)))))
        left -= lens[-1]
    if shape.T == shape.R:
        lens = draw(st.lists(st.integers(0, 1), min_size=shape.R, max_size=shape.R))
    if left and draw(st.booleans()):  # no padding rows at all
        lens[draw(st.integers(0, shape.R - 1))] += 0 if shape.T == shape.R else left
    past = [min(draw(edges), capacity - n) for n in lens]
    kv_lens = np.array(past) + np.array(lens)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    pages = iter(random.permutation(shape.P))
    # past a request's context a table may hold anything: pages of others, none, nonsense
    tables = random.choice([-1, 0, shape.P - 1, 1_000_000_000], (shape.R, shape.N))
    owned = np.zeros((shape.P, shape.B), bool)
    for request, length in enumerate(kv_lens):
        for block in range(-(-int(length) // shape.B)):
            tables[request, block] = page = next(pages)
            owned[page, : length - block * shape.B] = True

    def values(*size: int) -> np.ndarray:
        if ties:
            return random.integers(-1, 2, size).astype(np.float32)
        return random.standard_normal(size).astype(np.float32)

    starts = np.concatenate([[0], np.cumsum(lens)])
    padding = np.arange(shape.T)[:, None, None] >= starts[-1]
    cache = (shape.P, shape.Hkv, shape.B, shape.D)
    return Sample(
        shape=shape,
        tables=tables,
        starts=starts,
        kv_lens=kv_lens,
        q=np.where(padding, np.nan, values(shape.T, shape.Hq, shape.D)),
        k_cache=np.where(owned[:, None, :, None], values(*cache), np.nan),
        v_cache=np.where(owned[:, None, :, None], values(*cache), np.nan),
        idx_q=np.where(padding, np.nan, values(shape.T, shape.Hi, shape.D)),
        index_cache=np.where(owned[..., None], values(shape.P, shape.B, shape.D), np.nan),
    )


def index_score(s: Sample) -> np.ndarray:
    """[Hi, T, N], -inf where nothing is visible."""
    shape = s.shape
    scores = np.full((shape.Hi, shape.T, shape.N), -np.inf)
    for row, request, position in s.rows():
        keys = s.keys(s.index_cache, request, position + 1)
        for head in range(shape.Hi):
            for j, key in enumerate(keys):
                block = j // shape.B
                scores[head, row, block] = max(scores[head, row, block], float(s.idx_q[row, head].astype(float) @ key))
    return scores


def select_blocks(s: Sample, scores: np.ndarray) -> list[list[set[int]]]:
    """[Hi][T] -> the chosen blocks; none in padding rows."""
    shape = s.shape
    chosen: list[list[set[int]]] = [[set() for _ in range(shape.T)] for _ in range(scores.shape[0])]
    for row, _, position in s.rows():
        own = position // shape.B
        for head in range(scores.shape[0]):
            forced = {b for b in range(own + 1) if b < shape.init or b > own - shape.local}
            others = [b for b in range(own + 1) if b not in forced]
            others.sort(key=lambda b: (-scores[head, row, b], b))
            chosen[head][row] = forced | set(others[: shape.topk - len(forced)])
    return chosen


def attention(s: Sample, scale: float, chosen: list[list[set[int]]] | None = None) -> np.ndarray:
    """[T, Hq, D] over the whole context, or over the chosen blocks of each selection head; zeros in padding rows."""
    shape = s.shape
    out = np.zeros((shape.T, shape.Hq, shape.D))
    k_pages, v_pages = s.k_cache.transpose(0, 2, 1, 3), s.v_cache.transpose(0, 2, 1, 3)
    for row, request, position in s.rows():
        keys, values = (s.keys(pages, request, position + 1) for pages in (k_pages, v_pages))
        for head in range(shape.Hq):
            seen = np.arange(position + 1)
            if chosen is not None:
                blocks = chosen[head * len(chosen) // shape.Hq][row]
                seen = np.array([j for j in seen if j // shape.B in blocks], int)
            if len(seen) == 0:
                continue
            kv_head = head * shape.Hkv // shape.Hq
            logits = keys[seen, kv_head] @ s.q[row, head].astype(float) * scale
            weights = np.exp(logits - logits.max())
            out[row, head] = weights @ values[seen, kv_head] / weights.sum()
    return out


def as_selection(chosen: list[list[set[int]]], topk: int, order: np.random.Generator) -> np.ndarray:
    """[S, T, topk] of ids in random order, valid first."""
    selected = np.full((len(chosen), len(chosen[0]), topk), -1, np.int32)
    for head, rows in enumerate(chosen):
        for row, blocks in enumerate(rows):
            selected[head, row, : len(blocks)] = order.permutation(sorted(blocks))
    return selected


def grouped_matmul(x: np.ndarray, w: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """Row by row in float64; zeros past the groups."""
    out = np.zeros((x.shape[0], w.shape[2]))
    row = 0
    for group, size in enumerate(group_sizes):
        for _ in range(size):
            out[row] = x[row].astype(float) @ w[group].astype(float)
            row += 1
    return out
