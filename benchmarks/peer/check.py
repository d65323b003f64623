"""Do the peer's kernels compute what is timed? Small cases against this project's references, on the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import minimax_kernels as mk
from benchmarks.case_data import Queries
from benchmarks.cases import BLOCK, HEAD_DIM, TOPK, Case, Heads
from benchmarks.ops import SCALE
from benchmarks.parity.compare import ATTENTION_MAX
from benchmarks.peer.inputs import Inputs, Pool, index_queries, make_inputs, make_pool
from benchmarks.peer.measure import Operations
from benchmarks.peer.vllm_kernels import VllmKernels

DECODE = Case("decode", "check", 1, (1, 1, 1), (40 * BLOCK - 1, 5, 17 * BLOCK))
PREFILL = Case("prefill", "check", 1, (70, 1, 130), (30 * BLOCK - 3, 9, 0))
LEAST_EQUAL = 0.99  # of the selected blocks: equal but where scores tie within rounding


def check(kernels: VllmKernels, heads: Heads, device: torch.device) -> list[str]:
    """What is wrong, in words; nothing where selections and attention of both phases are right."""
    wrong = []
    for case in (DECODE, PREFILL):
        pool = make_pool(sum(case.blocks) + 3, heads, device)
        own = make_inputs(case, heads, pool, index_queries(Queries(heads, case.tokens), 0.0, case.tokens, device), 1)[0]
        operations = Operations(kernels, case, heads, pool)
        if case.phase == "decode":
            operations.decode_chain(own)
        else:
            operations.prefill_select(own, operations.prefill_score(own))
            operations.prefill_attention(own)
        wrong += [f"{case.phase} of {heads.q}/{heads.kv} heads: {text}" for text in _differences(own, pool)]
    return wrong


def _differences(own: Inputs, pool: Pool) -> list[str]:
    with jax.default_device(jax.devices("cpu")[0]):
        batch = mk.Batch(*(_array(x) for x in (own.block_table, own.query_starts, own.kv_lens)))
        scores = mk.index_score(_array(own.idx_q), _array(pool.index), batch, impl="reference")
        expected = np.asarray(mk.select_blocks(scores, batch, topk=TOPK, impl="reference"))
        selected = _array(own.selected)
        chosen_first = jnp.sort(selected)[..., ::-1]  # as the reference takes them
        keys, values = (_array(part) for part in pool.kv.split(HEAD_DIM, dim=-1))
        attended = mk.sparse_attention(_array(own.q), keys, values, chosen_first, batch, scale=SCALE, impl="reference")
    found = np.asarray(selected)
    equal = [len({*a} & {*b} - {-1}) for a, b in zip(found.reshape(-1, TOPK), expected.reshape(-1, TOPK), strict=True)]
    share = sum(equal) / (expected >= 0).sum()
    error = float(np.abs(np.asarray(_array(own.output)) - np.asarray(attended)).max())
    wrong = [] if share >= LEAST_EQUAL else [f"only {share:.1%} of the selected blocks are those of the reference"]
    return wrong + ([] if error <= ATTENTION_MAX else [f"attention is off by {error:.3g}"])


def _array(x: torch.Tensor) -> jax.Array:
    """In float32 or int32, on JAX's default device."""
    return jnp.asarray(x.float().cpu().numpy() if x.is_floating_point() else x.cpu().numpy())
