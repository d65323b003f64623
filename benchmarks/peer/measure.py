"""Times of the peer's kernels over one case: CUDA graphs of many calls that rotate through sets of inputs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.case_data import MOST_UNION_TOKENS, union_of_neighbours
from benchmarks.cases import TOPK, Case, Heads
from benchmarks.ops import SCALE
from benchmarks.peer.inputs import Inputs, Pool
from benchmarks.peer.vllm_kernels import VllmKernels
from benchmarks.timing import REPEATS, ROUNDS_SECONDS

FORCED = {"init_blocks": 0, "local_blocks": 1}


@dataclasses.dataclass(frozen=True)
class Operations:
    """One case's calls, each on one set of inputs; those of prefill take and give scores."""

    kernels: VllmKernels
    case: Case
    heads: Heads
    pool: Pool

    @property
    def device(self) -> torch.device:
        return self.pool.kv.device

    def decode_score(self, own: Inputs) -> torch.Tensor:
        return self.kernels.decode_score(*self._decode(own), **FORCED, **self._decode_lens())

    def decode_index(self, own: Inputs) -> torch.Tensor:
        return self.kernels.decode_index(
            *self._decode(own), topk=TOPK, **FORCED, **self._decode_lens(), out=own.selected
        )

    def decode_attention(self, own: Inputs) -> None:
        self.kernels.decode_attention(
            own.q,
            self.pool.kv,
            own.selected,
            own.block_table,
            own.kv_lens,
            num_kv_heads=self.heads.kv,
            sm_scale=SCALE,
            output=own.output,
            decode_query_len=1,
        )

    def decode_chain(self, own: Inputs) -> None:
        self.decode_index(own)
        self.decode_attention(own)

    def prefill_score(self, own: Inputs) -> torch.Tensor:
        return self.kernels.prefill_score(
            own.idx_q,
            self.pool.index,
            own.block_table,
            own.query_starts,
            own.kv_lens,
            own.prefix_lens,
            max_query_len=max(self.case.query_lens),
            max_seq_len=max(self.case.kv_lens),
            num_kv_heads=self.heads.kv,
        )

    def prefill_select(self, own: Inputs, score: torch.Tensor) -> torch.Tensor:
        return self.kernels.prefill_select(
            score,
            own.query_starts,
            own.prefix_lens,
            max_query_len=max(self.case.query_lens),
            topk=TOPK,
            **FORCED,
            out=own.selected,
        )

    def prefill_attention(self, own: Inputs) -> None:
        self.kernels.prefill_attention(
            own.q,
            self.pool.kv,
            own.selected,
            own.block_table,
            own.query_starts,
            own.kv_lens,
            own.prefix_lens,
            max_query_len=max(self.case.query_lens),
            num_kv_heads=self.heads.kv,
            sm_scale=SCALE,
            output=own.output,
        )

    def _decode(self, own: Inputs) -> tuple[Any, ...]:
        return own.idx_q, self.pool.index, own.block_table, own.kv_lens, max(self.case.kv_lens)

    def _decode_lens(self) -> dict[str, int]:
        return {"num_kv_heads": self.heads.kv, "decode_query_len": 1, "max_decode_query_len": 1}


def measure_decode(operations: Operations, sets: Sequence[Inputs]) -> dict[str, float]:
    """Microseconds of a call: score, score and selection, attention, all three."""
    calls = {
        "score_us": operations.decode_score,
        "index_us": operations.decode_index,
        "attn_us": operations.decode_attention,  # over what was just selected
        "chain_us": operations.decode_chain,
    }
    return {name: time_calls(call, sets, operations.device) for name, call in calls.items()}


def measure_prefill(operations: Operations, sets: Sequence[Inputs]) -> dict[str, float]:
    """Microseconds of a call of each step, and the distinct blocks that 8 neighbouring queries select."""
    case, device = operations.case, operations.device
    found = {"score_us": time_calls(operations.prefill_score, sets, device)}
    scored = [(own, operations.prefill_score(own)) for own in sets]
    found["topk_us"] = time_calls(lambda pair: operations.prefill_select(*pair), scored, device)
    found["attn_us"] = time_calls(operations.prefill_attention, sets, device)  # over what was just selected
    if case.tokens <= MOST_UNION_TOKENS:
        found["union8"] = union_of_neighbours(sets[0].selected.cpu().numpy(), case.query_lens)
    return found


def time_calls(call: Callable[[Any], Any], sets: Sequence[Any], device: torch.device) -> float:
    """Microseconds a call, the median of several replays of one CUDA graph; on a CPU, of plain calls.

    A first round compiles and tunes. The graph takes each set in turn, as often as fills some milliseconds.
    """
    if device.type != "cuda":
        return statistics.median(_wall(call, own) for own in sets) * 1e6
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for own in sets[:2]:
            call(own)
        stream.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        call(sets[0])
        end.record(stream)
        stream.synchronize()
    seconds = max(begin.elapsed_time(end) * 1e-3, 2e-6)
    rounds = max(1, round(ROUNDS_SECONDS / seconds / len(sets)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for own in sets:
                call(own)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / rounds / len(sets))
    graph.reset()
    return statistics.median(times)


def _wall(call: Callable[[Any], Any], own: Any) -> float:
    begin = time.perf_counter()
    call(own)
    return time.perf_counter() - begin


def row_of(case: Case, heads: Heads, rho: float | None, found: dict[str, float]) -> dict[str, Any]:
    """A line of a baseline file (benchmarks/data)."""
    row: dict[str, Any] = {"op": case.phase, "case": case.name, "H": heads.q, "KV": heads.kv}
    if case.phase == "prefill":
        row["rho"] = rho
    return row | {name: round(value, 2) for name, value in found.items()}
