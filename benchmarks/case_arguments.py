"""The command line's choice among the benchmark's cases."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import measure
from benchmarks.cases import HEADS


def add_case_arguments(group: argparse._ActionsContainer) -> None:
    """The options that `select_jobs` reads."""
    group.add_argument("--bench", choices=("prefill", "decode"), help="one phase")
    group.add_argument("--tp", type=int, choices=tuple(HEADS), help="1: 64/4 heads; 8: one rank's 8/1")
    group.add_argument("--rho", type=float, choices=(0.0, 0.99), help="drift of prefill's index queries")
    group.add_argument("--max-cases", type=int, help="heaviest cases of each phase")
    group.add_argument("--case", default="", help="cases whose name holds this, e.g. b64_ or t16384")
    group.add_argument("--shrink", type=int, default=1, help="divide all lengths (a try without a GPU)")


def tps_of(args: argparse.Namespace) -> list[int]:
    """Keys of HEADS."""
    return [args.tp] if args.tp else list(HEADS)


def select_jobs(
    args: argparse.Namespace,
    *,
    only_ops: Sequence[str] = (),
    query_len: int = 1,
    most_cases: int | None = None,
    cache_dtypes: Sequence[str] = ("bfloat16",),
) -> list[measure.Job]:
    """`measure.select_jobs` of what the command line asks for, of each phase at most `most_cases`."""
    return measure.select_jobs(
        phases=[args.bench] if args.bench else ["decode", "prefill"],
        tps=tps_of(args),
        rhos=[args.rho] if args.rho is not None else [0.99, 0.0],
        only_ops=only_ops,
        query_len=query_len,
        max_cases=min(filter(None, (args.max_cases, most_cases)), default=None),
        names=args.case,
        shrink=args.shrink,
        cache_dtypes=cache_dtypes,
    )
