#!/usr/bin/env python3
"""What segments with host-side attention cost and gain against one jit, on one device.

  python scripts/bench_segmented.py --out results          one H100: about three minutes
  python scripts/bench_segmented.py --out results --tiny   a try on a CPU

One TP8 rank's share of M3 (hidden 6144, 8 query heads, 1 KV head, 1 index head, bfloat16, random weights): steps
through segments and as one executable, host time, command buffers (CUDA graphs) on and off, what lies in graphs,
whether branches run side by side, memory after a release. Writes segments.json, timeline.svg, split.svg, explain.txt
and launches.txt to --out, and a table to standard output. A part that the time limit leaves out says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.segments.parts import PARTS, run_parts  # noqa: E402


def main() -> int:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("segments"), help="directory for the results (default: segments)"
    )
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (default: 8)")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, in this order (default: %(default)s)")
    parser.add_argument("--impl", help="implementation of the attention kernels (default: the best for the device)")
    parser.add_argument("--limit-s", type=float, default=225, help="start no part after so many seconds (default: 225)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU (default: off)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: {unknown[0]!r} must be one of {', '.join(PARTS)}")
    if args.layers < 2:
        parser.error(f"--layers = {args.layers}: must be at least 2")
    print(run_parts(parts, args.out, layers=args.layers, impl=args.impl, tiny=args.tiny, deadline=START + args.limit_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
