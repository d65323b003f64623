#!/usr/bin/env python3
"""Measures launch parameters of the sparse attention kernels on this GPU.

  python scripts/tune.py --out tuned              one GPU: some four minutes; writes tune.json and the table
  python scripts/tune.py --out tuned --write      and puts the table in its place in the package
  python scripts/tune.py --kinds few --quick --shrink 64 --interpret      a try without a GPU

The table, kernels/minimax_kernels/measured_launches.py, is looked up by shape when a kernel is traced; shapes that it
does not hold take the formulas in launch_table.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.tuning import TABLE, run_tuning, shapes, table_text  # noqa: E402

KINDS = ("decode", "fp8", "few", "page")


def main() -> int:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tuned"), help="directory for results (default: tuned)")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="of decode, fp8 (decode over 8-bit caches), few, page (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="two shapes a kind")
    parser.add_argument("--tokens", default="", metavar="N,N", help="only shapes of so many tokens (default: all)")
    parser.add_argument("--limit-s", type=float, default=240, help="time no shape after so many seconds (default: 240)")
    parser.add_argument("--shrink", type=int, default=1, help="divide the contexts (a try without a GPU)")
    parser.add_argument("--interpret", action="store_true", help="in Pallas's interpreter (a try without a GPU)")
    parser.add_argument("--write", action="store_true", help="put what was measured into the package's table")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"--kinds: {unknown[0]!r} must be one of {', '.join(KINDS)}")
    try:
        only = [int(tokens) for tokens in args.tokens.split(",") if tokens]
    except ValueError:
        parser.error(f"--tokens: {args.tokens!r} must be integers, separated by commas")
    if args.write and (args.shrink > 1 or args.interpret):
        parser.error("--write: not with --shrink or --interpret: what they measure is no GPU's time")
    if jax.default_backend() != "gpu" and not args.interpret:
        parser.error(f"this is a {jax.default_backend()}: pass --interpret for a try without a GPU")

    def say(text: str) -> None:
        print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)

    todo = shapes(kinds, args.quick, only)
    if not todo:
        parser.error(f"--tokens: {args.tokens!r} names no shape of {', '.join(kinds)}")
    best, measured = run_tuning(todo, START + args.limit_s, say, shrink=args.shrink, interpret=args.interpret)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe_machine(), "measured": measured}
    (args.out / "tune.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / TABLE.name).write_text(table_text(best), encoding="utf-8")
    if not measured:
        say("error: nothing was timed; give more time with --limit-s")
        return 1
    if args.write:
        (ROOT / TABLE).write_text(table_text(best), encoding="utf-8")
    say(f"wrote {args.out}/tune.json and {args.out}/{TABLE.name}")
    return 0 if sum(map(len, best.values())) == len({(shape.kind, shape.key) for shape in todo}) else 1


if __name__ == "__main__":
    sys.exit(main())
