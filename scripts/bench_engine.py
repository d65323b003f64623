#!/usr/bin/env python3
"""The engine on one GPU: does the cache fill the memory it is given, and how much of a decode step is the host's?

  python scripts/bench_engine.py --out results          one H100: under three minutes
  python scripts/bench_engine.py --out results --tiny   a try on a CPU

Over one TP8 rank's share of M3 (hidden 6144, 8 query heads, 1 KV head, 1 index head, random weights). Sizing: an engine
with --fraction of the memory, then full batches of full length; the peak must lie within 2 % of the fraction. Host
share: decode steps of a full batch, timed, then profiled. Each part runs in a process of its own, so that none finds
the other's memory. Writes engine_host.json, engine_sizing.json and decode_trace.json.gz (for ui.perfetto.dev) to --out.
Exit status: 0, or 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.engine.host_share import measure_host_share  # noqa: E402
from benchmarks.engine.sizing import measure_sizing  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

PARTS = ("host", "sizing")
HOST_TARGET = 0.15


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("engine"), help="directory for the results (default: engine)")
    add("--parts", default=",".join(PARTS), help="parts to run, in this order (default: %(default)s)")
    add("--layers", type=int, default=24, help="layers for the host's share; M3 has 60 (default: 24)")
    add("--batch", type=int, default=64, help="sequences (default: 64)")
    add("--context", type=int, default=2048, help="tokens of each at the start (default: 2048)")
    add("--steps", type=int, default=200, help="decode steps to time (default: 200)")
    add("--moe", action="store_true", help="layers with 16 experts instead of an MLP (default: off)")
    add("--sizing-layers", type=int, default=4, help="layers for sizing (default: 4)")
    add("--fraction", type=float, default=0.9, help="of the memory, for sizing (default: 0.9)")
    add("--tiny", action="store_true", help="small sizes, to try it on a CPU (default: off)")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts.split(",")) - set(PARTS)):
        parser.error(f"--parts: {unknown[0]!r} must be one of {', '.join(PARTS)}")
    if args.tiny:
        args.layers, args.batch, args.context, args.steps, args.sizing_layers = 3, 8, 40, 20, 2
    return args


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def main() -> int:
    """Runs the parts that were asked for; what is done is on disk even if a later part fails."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = args.parts.split(",")
    if len(parts) > 1:  # this process must not touch the device
        commands = [[sys.executable, *sys.argv, "--parts", part] for part in parts]
        return max(subprocess.run(command).returncode for command in commands)
    say(f"{parts[0]} ...")
    if parts[0] == "host":
        result = measure_host_share(
            args.layers, args.batch, args.context, args.steps, moe=args.moe, tiny=args.tiny, out=args.out
        )
        fine = args.tiny or result["host_share"] < HOST_TARGET
        say(
            f"a step of {result['batch']} takes {result['step_us']:.0f} us, the host's part {result['host_us']:.0f}: "
            f"{result['host_share']:.1%} (target: under {HOST_TARGET:.0%}); device busy: {result['device_busy_share']}"
        )
    else:
        result = measure_sizing(args.sizing_layers, fraction=args.fraction, tiny=args.tiny)
        fine = result["fine"]
        say(", ".join(f"{key} {value}" for key, value in result.items()))
    report = {"machine": describe_machine(), "seconds": time.monotonic() - START, parts[0]: result}
    (args.out / f"engine_{parts[0]}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
