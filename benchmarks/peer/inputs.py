"""Random inputs of a case as torch tensors, in the layouts of vLLM's caches; distributed as in benchmarks.case_data."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from benchmarks.case_data import Queries, make_tables
from benchmarks.cases import BLOCK, HEAD_DIM, TOPK, Case, Heads

CHUNK_PAGES = 1024


@dataclasses.dataclass(frozen=True)
class Pool:
    """One layer's caches: kv [P, Hkv, 128, 2 D], index [P, 128, D]."""

    kv: torch.Tensor
    index: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set of inputs of a case, and where its results go."""

    q: torch.Tensor
    idx_q: torch.Tensor
    block_table: torch.Tensor
    query_starts: torch.Tensor
    kv_lens: torch.Tensor
    prefix_lens: torch.Tensor
    output: torch.Tensor
    selected: torch.Tensor


def dtype_on(device: torch.device) -> torch.dtype:
    """bfloat16; for a try on a CPU float16, as Triton's interpreter has no bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def make_pool(pages: int, heads: Heads, device: torch.device, seed: int = 0) -> Pool:
    """Caches of N(0, 1), filled a few pages at a time."""
    generator = torch.Generator(device).manual_seed(seed)

    def filled(*shape: int) -> torch.Tensor:
        cache = torch.empty(pages, *shape, dtype=dtype_on(device), device=device)
        for part in cache.split(CHUNK_PAGES):
            part.normal_(generator=generator)
        return cache

    return Pool(filled(heads.kv, BLOCK, 2 * HEAD_DIM), filled(BLOCK, HEAD_DIM))


def index_queries(queries: Queries, rho: float, count: int, device: torch.device) -> torch.Tensor:
    """[count, Hi, D]: those of our own measurements."""
    return torch.from_numpy(queries.index_rows(rho, count).astype(np.float32)).to(device, dtype_on(device))


def make_inputs(case: Case, heads: Heads, pool: Pool, idx_q: torch.Tensor, sets: int, seed: int = 7) -> list[Inputs]:
    """`sets` sets over disjoint, randomly permuted pages; the index queries are the same, their keys are not."""
    device = pool.kv.device

    def integers(values) -> torch.Tensor:
        return torch.tensor(np.asarray(values, np.int32), device=device)

    made = []
    generator = torch.Generator(device).manual_seed(seed)
    for tables in make_tables(case, pool.index.shape[0], sets, seed):
        q = torch.empty(case.tokens, heads.q, HEAD_DIM, dtype=dtype_on(device), device=device)
        made.append(
            Inputs(
                q=q.normal_(generator=generator),
                idx_q=idx_q[: case.tokens],
                block_table=integers(tables),
                query_starts=integers(np.cumsum([0, *case.query_lens])),
                kv_lens=integers(case.kv_lens),
                prefix_lens=integers(case.prefix_lens),
                output=torch.empty_like(q),
                selected=torch.empty(heads.index, case.tokens, TOPK, dtype=torch.int32, device=device),
            )
        )
    return made
