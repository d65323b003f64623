"""The benchmark's cases and baselines, read from benchmarks/data."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
BASELINE_FILES = {gpu: f"vllm_0.33_triton_{gpu.lower()}.jsonl" for gpu in ("H100", "H200")}
BLOCK = 128
HEAD_DIM = 128
TOPK = 16

PREFILL_OPS = ("score", "select", "attention", "chain")
DECODE_OPS = ("score", "index", "attention", "chain")  # index: score and selection together


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of one device: query, KV and index."""

    tp: int
    q: int
    kv: int
    index: int


HEADS = {1: Heads(1, 64, 4, 4), 8: Heads(8, 8, 1, 1)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One ragged batch: `query_lens` new tokens behind `prefix_lens` cached ones."""

    phase: str  # "prefill" or "decode"
    name: str
    weight: int
    query_lens: tuple[int, ...]
    prefix_lens: tuple[int, ...]

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Tokens of context of each request, the new ones included."""
        return tuple(a + b for a, b in zip(self.query_lens, self.prefix_lens, strict=True))

    @property
    def batch(self) -> int:
        """Requests."""
        return len(self.query_lens)

    @property
    def tokens(self) -> int:
        """New tokens of all requests."""
        return sum(self.query_lens)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Pages of each request."""
        return tuple(-(-length // BLOCK) for length in self.kv_lens)

    @property
    def short_name(self) -> str:
        """A name for tables: decode names say it all, prefill ones are hashes."""
        if self.phase == "decode":
            return self.name.removesuffix("_q8")
        return f"b{self.batch}_t{self.tokens}_kv{max(self.kv_lens)}"

    def shrunk(self, divisor: int) -> Case:
        """The case with lengths divided, under a name without baseline; itself for 1."""
        if divisor == 1:
            return self
        queries = tuple(max(1, length // divisor) for length in self.query_lens)
        prefixes = tuple(length // divisor for length in self.prefix_lens)
        return Case(self.phase, f"{self.name}/{divisor}", self.weight, queries, prefixes)


@functools.cache
def prefill_cases() -> tuple[Case, ...]:
    """The prefill workload, heaviest first."""
    cases = [
        Case("prefill", row["name"], row["weight"], tuple(row["query_lens"]), tuple(row["prefix_lens"]))
        for row in _rows(DATA / "msa_prefill.jsonl")
    ]
    return tuple(sorted(cases, key=lambda case: -case.weight))


@functools.cache
def decode_cases(query_len: int = 1) -> tuple[Case, ...]:
    """The decode workload with `query_len` new tokens a request, heaviest first."""
    cases = []
    for row in _rows(DATA / "msa_decode.jsonl"):
        lens = row["seq_lens"]
        if min(lens) < query_len:
            raise ValueError(f"query_len = {query_len}: must be at most {min(lens)}, the shortest of {row['name']}")
        prefix = tuple(length - query_len for length in lens)
        cases.append(Case("decode", row["name"], row["weight"], (query_len,) * len(lens), prefix))
    return tuple(sorted(cases, key=lambda case: -case.weight))


def baseline_file(device: str) -> Path:
    """vLLM's times on a GPU of this name; those of an H100 where there are none."""
    return DATA / next((file for gpu, file in BASELINE_FILES.items() if gpu in device), BASELINE_FILES["H100"])


class Baselines:
    """vLLM's times, from a file that scripts/bench_vllm.py writes."""

    def __init__(self, path: Path):
        """Raises ValueError or OSError where the file is not one."""
        self.name = path.name
        try:
            self._by_case = {_key(row): row for row in _rows(path)}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"baseline = {path}: a line is not one of scripts/bench_vllm.py: {error}") from None

    def of(self, case: Case, heads: Heads, rho: float | None) -> dict[str, float]:
        """Microseconds by op (empty where it was not measured) and, for prefill, the `union8` where it was counted."""
        decode = case.phase == "decode"
        row = self._by_case.get((case.phase, case.name, heads.q, heads.kv, None if decode else rho))
        if row is None or (decode and set(case.query_lens) != {1}):
            return {}
        if decode:
            keys = ("score_us", "index_us", "attn_us", "chain_us")
            return {op: row[key] for op, key in zip(DECODE_OPS, keys, strict=True)}
        parts = (row["score_us"], row["topk_us"], row["attn_us"])
        union = {"union8": row["union8"]} if "union8" in row else {}
        return dict(zip(PREFILL_OPS, (*parts, sum(parts)), strict=True)) | union


def _key(row: dict) -> tuple:
    return (row["op"], row["case"], row["H"], row["KV"], row.get("rho"))


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
