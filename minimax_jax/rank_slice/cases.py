"""The steps to measure, the model they are of, and what is aimed at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from minimax_jax.config import MiniMaxM3Config

DECODE, PREFILL = "decode", "prefill"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
      kind: "decode": a token for each of `batch` requests; "prefill": `query_len` tokens of one.
      batch: requests; query_len: new tokens of each; context: tokens in the caches before them.
    """

    kind: str
    batch: int
    query_len: int
    context: int

    @property
    def tokens(self) -> int:
        """New tokens of the step."""
        return self.batch * self.query_len

    @property
    def name(self) -> str:
        """For tables."""
        if self.kind == DECODE:
            return f"decode, batch {self.batch}, context {self.context}"
        return f"prefill, {self.query_len} tokens after {self.context}"


@dataclasses.dataclass(frozen=True)
class Launching:
    """How decode steps are launched.

    Attributes:
      steps: of a launch.
      graphs: whether on a GPU they lie in CUDA graphs.
    """

    steps: int
    graphs: bool

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.steps} a launch, {'graphs' if self.graphs else 'no graphs'}"


@dataclasses.dataclass(frozen=True)
class Target:
    """What a case is to reach on an H100: at most so many milliseconds, and what to aim at."""

    most_ms: float
    aim: str


# of 60 layers at TP8 and EP8
TARGETS = {
    Case(DECODE, 1, 1, 8192): Target(4.0, "2x floor"),
    Case(DECODE, 32, 1, 8192): Target(9.0, "1.6x floor"),
    Case(DECODE, 64, 1, 32768): Target(15.0, "1.5x floor"),
    Case(PREFILL, 1, 8192, 0): Target(160.0, "50 % MFU"),
    Case(PREFILL, 1, 8192, 57344): Target(190.0, "less"),
}


def select_cases(
    batches: tuple[int, ...], contexts: tuple[int, ...], chunk: int, prefixes: tuple[int, ...], only: str | None = None
) -> list[Case]:
    """Every batch with every context, every prefix; those with a target come first, since time may run out.

    Args:
      only: the cases of one kind.
    """
    cases = [Case(PREFILL, 1, chunk, prefix) for prefix in prefixes]
    cases += [Case(DECODE, batch, 1, context) for context in contexts for batch in batches]
    return sorted((case for case in cases if only in (None, case.kind)), key=lambda case: case not in TARGETS)


def waves(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases in groups that are compiled together and then measured, those with a target before the others.

    In each half chunks are first, since their segments compile fast.
    """
    groups: dict[tuple[bool, bool], list[Case]] = {}
    for case in cases:
        groups.setdefault((case not in TARGETS, case.kind == DECODE), []).append(case)
    return [groups[key] for key in sorted(groups)]


def launchings(steps: Sequence[int], platform: str) -> list[Launching]:
    """Every number of steps a launch, with graphs and without where there are any."""
    kinds = (True, False) if platform == "gpu" else (False,)
    return [Launching(count, graphs) for count in dict.fromkeys(steps) for graphs in kinds]


def slice_config(layers: int, *, tiny: bool) -> MiniMaxM3Config:
    """MiniMax-M3's first layers, of fewer than four those before its second sparse one.

    Args:
      tiny: a small model of the same kind instead, of which eight ranks have a part each.

    Raises:
      ValueError: for more layers than M3 has.
    """
    config = MiniMaxM3Config.m3()
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"--layers = {layers}: must be within 1..{config.num_hidden_layers}")
    first = max(0, 4 - layers)  # three dense layers come first
    kinds: dict[str, Any] = {
        "num_hidden_layers": layers,
        "layer_types": config.layer_types[first : first + layers],
        "mlp_layer_types": config.mlp_layer_types[first : first + layers],
        "vision": None,
    }
    if tiny:
        kinds |= {
            "hidden_size": 128, "vocab_size": 512, "num_attention_heads": 16, "head_dim": 32, "rotary_dim": 16,
            "index_head_dim": 32, "index_block_size": 16, "index_topk_blocks": 2, "dense_intermediate_size": 256,
            "intermediate_size": 64, "shared_intermediate_size": 256, "num_local_experts": 16,
            "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 4096,
        }  # fmt: skip
    return config.replace(**kinds)
