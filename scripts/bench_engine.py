#!/usr/bin/env python3
"""The engine on one GPU: does the cache fill the memory it is given, and how much of a decode step is the host's?

  python scripts/bench_engine.py --out results          one H100
  python scripts/bench_engine.py --out results --tiny   a try on a CPU

Over one TP8 rank's share of M3 (hidden 6144, 8 query heads, 1 KV head, 1 index head, random weights). Sizing: an engine
with --fraction of the memory, then full batches of full length; the peak must lie within 2 % of the fraction. Host
share: decode steps of a full batch, one and several a launch, the loop of several in a CUDA graph or not, timed, then
profiled; one way must be under the target. Each part runs in a process of its own, so that none finds the other's
memory. Writes engine_host.json (after each way), engine_sizing.json and decode_trace_*.json.gz (for ui.perfetto.dev)
to --out.
Exit status: 0, or 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.engine.host_share import ROWS, Variant, measure_host_share  # noqa: E402
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
    add("--steps", type=int, default=160, help="decode steps to time, in each way (default: 160)")
    add("--launch-steps", default="1,4,8,16", help="decode steps a launch (default: %(default)s)")
    add("--loops", choices=("both", "graph", "plain"), default="both", help="loops in CUDA graphs (default: both)")
    add("--rows", choices=tuple(ROWS), default="sampled", help="what requests ask for (default: %(default)s)")
    add("--no-text", dest="text", action="store_false", help="answers without text (default: off)")
    add("--moe", action="store_true", help="layers with 16 experts instead of an MLP (default: off)")
    add("--sizing-layers", type=int, default=4, help="layers for sizing (default: 4)")
    add("--fraction", type=float, default=0.9, help="of the memory, for sizing (default: 0.9)")
    add("--tiny", action="store_true", help="small sizes, to try it on a CPU (default: off)")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts.split(",")) - set(PARTS)):
        parser.error(f"--parts: {unknown[0]!r} must be one of {', '.join(PARTS)}")
    counts = args.launch_steps.split(",")
    if not all(count.isdecimal() and int(count) >= 1 for count in counts):
        parser.error(f"--launch-steps: {args.launch_steps!r} must be integers >= 1 with commas")
    args.launch_steps = [int(count) for count in counts]
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
        fine = host(args)
    else:
        result = measure_sizing(args.sizing_layers, fraction=args.fraction, tiny=args.tiny)
        fine = result["fine"]
        say(", ".join(f"{key} {value}" for key, value in result.items()))
        write(args.out, "sizing", result)
    return 0 if fine else 1


def host(args: argparse.Namespace) -> bool:
    """The host's share in each way; whether one of them is under the target."""
    plain = [Variant(count) for count in args.launch_steps if count == 1 or args.loops != "graph"]
    graphs = [Variant(count, graph_loop=True) for count in args.launch_steps if count > 1 and args.loops != "plain"]
    sizes = {name: getattr(args, name) for name in ("layers", "batch", "context", "steps", "moe", "rows", "text")}
    ways: list[dict[str, Any]] = []
    for way in measure_host_share(**sizes, variants=plain + graphs, tiny=args.tiny, out=args.out):
        ways.append(way)
        write(args.out, "host", sizes | {"target": HOST_TARGET, "ways": ways})
        name = Variant(way["steps_per_launch"], way["graph_loop"]).name
        say(
            f"{name}: a step of {args.batch} takes {way['step_us']:.0f} us, the host's part {way['host_us']:.0f}: "
            f"{way['host_share']:.1%} (target: under {HOST_TARGET:.0%}); launches {way['launch_us']:.0f} us; all "
            f"threads {way['process_share']:.2f} CPUs; device busy: {way['device_busy_share']}; first launches "
            f"{way['first_launches_s']:.1f} s" + (f"; no graph: {way['refusal']}" if way["refusal"] else "")
        )
    return args.tiny or min(way["host_share"] for way in ways) < HOST_TARGET


def write(out: Path, part: str, result: dict[str, Any]) -> None:
    """A part's results."""
    report = {"machine": describe_machine(), "seconds": time.monotonic() - START, part: result}
    (out / f"engine_{part}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
