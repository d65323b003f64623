"""Random inputs of a case as torch tensors, in the layouts of vLLM's caches; distributed as in benchmarks.case_data."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

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


def index_queries(tokens: int, heads: int, rho: float, device: torch.device, seed: int = 101) -> torch.Tensor:
    """[tokens, heads, D] of the AR(1) process from zero, as benchmarks.case_data has it."""
    noise = np.random.default_rng(seed).standard_normal((tokens, heads, HEAD_DIM), np.float32)
    state, scale = np.zeros_like(noise[0]), np.float32(np.sqrt(1 - rho * rho))
    if rho:
        for row in noise:
            state = np.float32(rho) * state + scale * row
            row[:] = state
    return torch.from_numpy(noise).to(device, dtype_on(device))


def make_inputs(case: Case, heads: Heads, pool: Pool, idx_q: torch.Tensor, sets: int, seed: int = 7) -> list[Inputs]:
    """`sets` sets over disjoint, randomly permuted pages; the index queries are the same, their keys are not."""
    device = pool.kv.device
    per_set, pages = sum(case.blocks), pool.index.shape[0]
    if per_set * sets > pages:
        raise ValueError(f"sets = {sets}: {case.name} needs {per_set} pages a set and the pool has {pages}")
    random = np.random.default_rng(seed)
    order = random.permutation(pages)[: per_set * sets].astype(np.int32).reshape(sets, per_set)

    def integers(values) -> torch.Tensor:
        return torch.tensor(np.asarray(values, np.int32), device=device)

    made = []
    generator = torch.Generator(device).manual_seed(seed)
    for own in order:
        tables = random.integers(0, pages, (case.batch, max(case.blocks))).astype(np.int32)
        for row, part in zip(tables, np.split(own, np.cumsum(case.blocks)[:-1]), strict=True):
            row[: len(part)] = part
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
