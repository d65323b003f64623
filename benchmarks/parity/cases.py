"""The shapes and ragged batches that parity is checked on."""

from __future__ import annotations

import dataclasses

from benchmarks import cases as workload
from benchmarks.parity.samples import ParityCase, Shape
from minimax_kernels import FP8

BASE = (Shape(64, 4, 4), Shape(8, 1, 1))
OTHER_HEADS = (
    Shape(16, 1, 1),
    Shape(32, 2, 2),
    Shape(64, 4, 1),
    Shape(64, 4, 2),
    Shape(32, 2, 1),
    Shape(32, 2, 4),  # two index heads a KV head
)
CHANGES: tuple[dict, ...] = (
    {"dtype": "float16"},
    {"head_dim": 64},
    {"block": 64},
    {"topk": 8},
    {"topk": 32},
    {"head_dim": 64, "block": 64, "dtype": "float16", "topk": 8},
    {"init": 1, "local": 2},
    {"cache_dtype": FP8},
    {"cache_dtype": FP8, "head_dim": 64, "block": 64, "dtype": "float16"},
)
SMALL_BASE = (
    Shape(8, 2, 2, head_dim=32, block=16, topk=4),
    Shape(4, 1, 1, head_dim=16, block=16, topk=3, init=1, local=2),
    Shape(8, 2, 1, head_dim=16, block=16, topk=2, dtype="float16"),
    Shape(8, 2, 2, head_dim=32, block=16, topk=4, cache_dtype=FP8),
)


def cases(quick: bool, small: bool) -> list[ParityCase]:
    """The cases to check, most telling first.

    Args:
      quick: the two head counts of the model, and one ragged batch of each other shape.
      small: shapes that the CPU and the interpreter can do; for trying and for compute-sanitizer.
    """
    if small:
        bases = SMALL_BASE[:1] if quick else SMALL_BASE
        return [case for shape in bases for case in batches(shape, few=True)]
    found = [case for shape in BASE for case in batches(shape)]
    for shape in OTHER_HEADS:
        found += batches(shape, few=True)[: 2 if quick else None]
    for change in CHANGES:
        for shape in BASE:
            found += batches(dataclasses.replace(shape, **change), few=True)[: 2 if quick else None]
    return found if quick else found + from_workload()


def batches(shape: Shape, few: bool = False) -> list[ParityCase]:
    """Prefill, decode, verify and chunk batches of a shape.

    Requests without tokens, of one token, ending and starting at block edges, and of contexts well beyond topk blocks.
    """
    block = shape.block
    long = (shape.topk + 8) * block
    made = [
        ParityCase(
            "mixed",
            shape,
            (0, 1, block - 1, block, block + 1, 0, 37, 2 * block + 3),
            (5 * block, 3 * block - 1, 0, 2 * block, long + 5, 0, long - 37, long + 1),
            padding=5,
        ),
        ParityCase(
            "decode",
            shape,
            (1,) * 4 + (0,) + (1,) * 4,
            (0, block - 2, block - 1, block, 3 * block, long - 1, long, long + 77 % block, 2 * block + 5),
            padding=1,
        ),
        ParityCase("verify 8", shape, (8, 8, 8, 0, 8), (0, block - 8, long - 3, long, long + block // 2), padding=8),
        ParityCase("chunk", shape, (3 * block + 7,), (long + 3,)),
    ]
    if few:
        return made
    spread = tuple((long * (i + 1) // 32) for i in range(32))
    return [
        *made,
        ParityCase("decode batch 32", shape, (1,) * 32, spread),
        ParityCase("decode long", shape, (1,), (1500 * block + 7,)),
        *(ParityCase(f"verify {n}", shape, (n,) * 4, (0, long - n, long + 1, 70 * block)) for n in (2, 4, 16)),
        ParityCase("verify 2-16", shape, tuple(range(2, 17)), tuple(long + 31 * i for i in range(15)), padding=3),
        ParityCase("from nothing", shape, (long + 9,), (0,)),
        ParityCase("nothing to do", shape, (0, 0), (0, block + 1), padding=4),
    ]


def from_workload() -> list[ParityCase]:
    """A few real prefill batches at one tensor rank's heads, and one at the whole model's."""
    by_name = {case.short_name: case for case in workload.prefill_cases()}
    chosen = (("b1_t1404_kv46844", 0), ("b10_t9115_kv73356", 1), ("b5_t2666_kv51665", 1), ("b1_t16384_kv47744", 1))
    return [
        ParityCase(f"workload {name}", BASE[which], by_name[name].query_lens, by_name[name].prefix_lens)
        for name, which in chosen
    ]
