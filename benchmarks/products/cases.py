"""The products of one TP8 and EP8 rank of MiniMax-M3, what each must move and compute, and launches to try."""

from __future__ import annotations

import dataclasses
import functools

from benchmarks.floors import BF16, Work
from minimax_kernels.matmul_launches import FEW_ROWS, MatmulLaunch, group_launch, largest_divisor, matmul_launch
from minimax_kernels.routed_experts.api import MANY_ROWS
from minimax_kernels.triton_call import Launch

HIDDEN, EXPERT_WIDTH, RANKS, EXPERTS, PER_TOKEN = 6144, 3072, 8, 128, 4
LOCAL = EXPERTS // RANKS
MXFP8_BYTES = 1 + 1 / 32
WEIGHTS = {  # inputs, widths of what one launch multiplies
    "qkv_index": (HIDDEN, (1024, 128, 128, 128, 128)),
    "o": (1024, (HIDDEN,)),
    "shared_gate_up": (HIDDEN, (768,)),
    "shared_down": (384, (HIDDEN,)),
    "dense_gate_up": (HIDDEN, (3072,)),
    "dense_down": (1536, (HIDDEN,)),
}
GROUPS = {"gate_up": (HIDDEN, 2 * EXPERT_WIDTH), "down": (EXPERT_WIDTH, HIDDEN)}
TOKENS = (1, 64, 8192, 32, 8, 1024)  # the most telling first, as a limit of time leaves out the last


@dataclasses.dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
      kind: "matmul"; "groups" or "joined" for sorted rows of experts ("joined": the activation within).
      weight: a name in WEIGHTS or GROUPS.
      tokens: of the step; experts get 4 pairs a token, of which an eighth is this rank's.
      weights: "mxfp8" or "bf16" (experts only).
      mosaic: on Mosaic GPU, with the copies of rows that it needs ("groups" and "joined" of MXFP8 only).
    """

    kind: str
    weight: str
    tokens: int
    weights: str = "mxfp8"
    shrink: int = 1
    mosaic: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        kind = " bf16" * (self.weights == "bf16") + " Mosaic GPU" * self.mosaic
        return f"{self.weight} {self.tokens} tokens{kind}"

    @property
    def inputs(self) -> int:
        """K."""
        return (WEIGHTS | GROUPS)[self.weight][0] // self.shrink

    @property
    def widths(self) -> tuple[int, ...]:
        """N of each weight of the launch."""
        widths = WEIGHTS[self.weight][1] if self.kind == "matmul" else (GROUPS[self.weight][1],)
        return tuple(width // self.shrink for width in widths)

    @property
    def rows(self) -> int:
        """Rows to multiply: tokens, or this rank's pairs."""
        return self.tokens if self.kind == "matmul" else max(self.tokens * PER_TOKEN // RANKS, 1)

    @property
    def all_rows(self) -> int:
        """Rows that there is room for: pairs of all ranks."""
        return self.tokens if self.kind == "matmul" else self.tokens * PER_TOKEN

    def work(self, group_sizes: list[int] | None = None) -> Work:
        """FLOPs and bytes; of experts, those that have rows."""
        read = 1 if group_sizes is None else sum(size > 0 for size in group_sizes)
        rows = self.rows if group_sizes is None else sum(group_sizes)
        columns = sum(self.widths)
        weight = read * self.inputs * columns * (BF16 if self.weights == "bf16" else MXFP8_BYTES)
        written = columns // 2 if self.kind == "joined" else columns
        return Work(2 * rows * self.inputs * columns, weight + BF16 * rows * (self.inputs + written))

    @property
    def column_divisor(self) -> int:
        """What columns of a tile must divide."""
        least = min(largest_divisor(width, 1 << 30) for width in self.widths)
        return least // 2 if self.kind == "joined" else least

    @property
    def launch(self) -> MatmulLaunch:
        """What the kernels would choose."""
        columns, quantized = sum(self.widths), self.weights == "mxfp8"
        if self.kind == "matmul":
            return matmul_launch(self.rows, self.inputs, self.column_divisor, columns, quantized=quantized)
        return group_launch(
            self.rows, LOCAL, self.inputs, self.column_divisor, columns,
            joined=self.kind == "joined", quantized=quantized, all_rows=self.all_rows,
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, str, int, int, int, int]:
        """Of the measured table."""
        groups = 1 if self.kind == "matmul" else LOCAL
        return self.kind, self.weights, groups, self.inputs, sum(self.widths), 1 << (self.rows - 1).bit_length()


def all_cases(
    tokens: tuple[int, ...] = TOKENS, *, bf16: bool = False, mosaic: bool = False, shrink: int = 1
) -> list[Case]:
    """Linears and experts, in the order of `tokens`; on Mosaic GPU too, where experts have many rows."""
    found = []
    for count in tokens:
        found += [Case("matmul", name, count, shrink=shrink) for name in WEIGHTS]
        for weights in ("mxfp8", "bf16") if bf16 else ("mxfp8",):
            found += [
                Case("joined", "gate_up", count, weights, shrink=shrink),
                Case("groups", "down", count, weights, shrink=shrink),
            ]
        if mosaic and found[-1].rows >= MANY_ROWS * LOCAL:
            found += [dataclasses.replace(case, weights="mxfp8", mosaic=True) for case in found[-2:]]
    return found


MOST_CANDIDATES = 5
MANY = (  # rows of a program, columns, inputs, warps, stages
    (128, 128, 64, 4, 4), (256, 128, 64, 8, 3), (128, 128, 128, 4, 2), (256, 64, 64, 4, 3),
)  # fmt: skip
FEW_JOINED = ((16, 32, 256, 4, 3), (16, 32, 128, 4, 4), (16, 64, 128, 4, 4), (16, 32, 256, 4, 2))  # of one half
FEW_GROUPED = ((16, 64, 256, 4, 3), (16, 64, 128, 4, 4), (16, 128, 128, 4, 3), (16, 64, 256, 4, 2))


def candidates(case: Case) -> list[MatmulLaunch]:
    """Launches to try, the formula's own first."""
    own = case.launch
    joined, halves = case.kind == "joined", 2 if case.kind == "joined" else 1
    few = case.rows // (1 if case.kind == "matmul" else LOCAL) <= FEW_ROWS

    changed = functools.partial(dataclasses.replace, own)
    if not few:
        tried = [MatmulLaunch(m, n // halves, k, own.splits, Launch(warps, stages)) for m, n, k, warps, stages in MANY]
    elif case.kind == "matmul":
        tried = [
            changed(splits=own.splits // 2) if own.splits > 1 else changed(block_n=64 if own.block_n < 64 else 32),
            changed(block_k=256),
            changed(block_k=64 if own.block_k > 64 else 128),
            changed(block_k=256, splits=max(own.splits // 2, 1)),
        ]
    else:
        least = FEW_JOINED if joined else FEW_GROUPED
        tried = [MatmulLaunch(m, n, k, 1, Launch(warps, stages)) for m, n, k, warps, stages in least]
        if own.splits > 1:
            tried = [changed(splits=own.splits // 2), changed(block_k=256), *tried]
    found = [own]
    for launch in tried:
        fits = case.inputs % launch.block_k == 0 and case.column_divisor % launch.block_n == 0
        fits = fits and launch.splits <= case.inputs // launch.block_k
        if fits and launch not in found:
            found.append(launch)
    return found[:MOST_CANDIDATES]
