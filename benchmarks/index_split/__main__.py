"""What sharing out index keys costs and gains: sparse attention of M3 over several GPUs of one host, both ways.

  python -m benchmarks.index_split --out results            8 GPUs; --tensor 2 or 4 for fewer
  python -m benchmarks.index_split --out results --tiny     a try on simulated CPU devices

Random keys, bfloat16, one rank's heads of M3 on each device. Compares the blocks that both ways select, then times
attention a layer. Writes index_split.json to --out and a table to standard output; exit status 1 where more than one
row in a hundred selects other blocks (the last bit of a score may differ between page sizes).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.index_split.layers import Case, SparseLayers
from benchmarks.machine import describe_machine

_MOST_DIFFERENT = 0.01
_RUNS, _REPEATS = 10, 5
_DECODE = [(1, 8192), (8, 8192), (32, 8192), (1, 32768), (8, 32768), (32, 32768), (1, 131072), (8, 131072)]
CASES = (*(Case(requests, 1, context) for requests, context in _DECODE), Case(1, 2048, 32768), Case(1, 2048, 131072))
TINY = (Case(2, 1, 4096), Case(1, 40, 4096))


def main() -> int:
    """Runs all cases that the time limit leaves room for."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.index_split",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("index_split"), help="directory (default: index_split)")
    parser.add_argument("--tensor", type=int, choices=(2, 4, 8), default=8, help="devices (default: 8)")
    parser.add_argument("--impl", help="implementation of the kernels (default: the best for the device)")
    parser.add_argument("--layers", type=int, default=32, help="layers at most (default: 32)")
    parser.add_argument("--limit-s", type=float, default=400, help="start no case after so many seconds (default: 400)")
    parser.add_argument("--tiny", action="store_true", help="small sizes on CPU devices (default: off)")
    args = parser.parse_args()
    if args.tiny:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.tensor)
    if len(jax.devices()) < args.tensor:
        parser.error(f"--tensor = {args.tensor}: must be at most {len(jax.devices())}, the devices there are")
    rows: list[dict[str, Any]] = []
    record = {"machine": describe_machine(), "tensor": args.tensor, "impl": args.impl or "best", "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    print("requests  new  context   all keys us  shared out us   gain  other blocks")
    for case in TINY if args.tiny else CASES:
        if time.monotonic() - start > args.limit_s:
            rows.append({**vars(case), "left_out": "time limit"})
            continue
        row = _row(case, args.tensor, args.impl, 2 if args.tiny else args.layers)
        rows.append(row)
        (args.out / "index_split.json").write_text(json.dumps(record, indent=1) + "\n")
        print(
            f"{case.requests:8} {case.new:4} {case.context:8} {row['all_keys_us']:13.1f} {row['shared_out_us']:14.1f} "
            f"{row['all_keys_us'] / row['shared_out_us']:6.2f} {row['different_rows']:13.5f}",
            flush=True,
        )
    (args.out / "index_split.json").write_text(json.dumps(record, indent=1) + "\n")
    worst = max((row["different_rows"] for row in rows if "different_rows" in row), default=0.0)
    print(f"other blocks selected in {worst:.5f} of the rows at most: {'ok' if worst <= _MOST_DIFFERENT else 'WRONG'}")
    return int(worst > _MOST_DIFFERENT)


def _row(case: Case, tensor: int, impl: str | None, most_layers: int) -> dict[str, Any]:
    layers = SparseLayers(case, tensor, impl=impl, most_layers=most_layers)
    different = layers.different_rows()
    ways = {"all_keys_us": layers.attend(split=False), "shared_out_us": layers.attend(split=True)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):  # the ways take turns
        for name, run in ways.items():
            jax.block_until_ready(run())
            began = time.perf_counter()
            jax.block_until_ready([run() for _ in range(_RUNS)])
            found[name].append((time.perf_counter() - began) / _RUNS / layers.layers * 1e6)
    medians = {name: statistics.median(times) for name, times in found.items()}
    spreads = {f"{name}_spread": (max(times) - min(times)) / medians[name] for name, times in found.items()}
    return {**vars(case), "layers": layers.layers, "different_rows": different, **medians, **spreads}


if __name__ == "__main__":
    sys.exit(main())
