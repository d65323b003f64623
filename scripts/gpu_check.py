#!/usr/bin/env python3
"""One command on a GPU: are the kernels right, and how fast are they?

  python scripts/gpu_check.py --out results          parity of every op, then the benchmark
  python scripts/gpu_check.py --only parity --ops index_score,msa
  python scripts/gpu_check.py --only bench --bench prefill --tp 8 --rho 0.99 --max-cases 6
  python scripts/gpu_check.py --only bench --cache-dtype fp8    8-bit caches against bf16 ones, case by case
  python scripts/gpu_check.py --impl reference --shrink 64 --quick      a try without a GPU

Parity: each op against the reference in float32 on upcast inputs. Benchmark: the MSA workload against vLLM's times
(--baseline) and the floor of this device. Writes parity.json, bench.json and bench.png to --out.
Exit status: 0, or 1 when a parity check or a benchmark case failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402

from benchmarks.bench_run import run_bench  # noqa: E402
from benchmarks.case_arguments import add_case_arguments, select_jobs  # noqa: E402
from benchmarks.cases import DECODE_OPS, PREFILL_OPS, Baselines, baseline_file  # noqa: E402
from benchmarks.parity.run import OPS, run_parity  # noqa: E402
from minimax_kernels import FP8  # noqa: E402

BENCH_OPS = tuple(dict.fromkeys((*PREFILL_OPS, *DECODE_OPS)))
QUICK_CASES = 4
START = time.monotonic()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="pallas_triton", help="implementation to check (default: %(default)s)")
    parser.add_argument("--only", choices=("parity", "bench"), help="one of the two parts")
    parser.add_argument("--quick", action="store_true", help=f"fewer shapes; the {QUICK_CASES} heaviest cases a phase")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for results (default: %(default)s)")
    parser.add_argument(
        "--limit-s", type=float, default=540, help="seconds for everything; what is left out is said (default: 540)"
    )
    parser.add_argument(
        "--cache-dtype",
        choices=("bfloat16", "fp8"),
        help="parity: cases over these caches only (default: all); benchmark: fp8 measures every case over bfloat16 "
        "and over e4m3 caches (default: bfloat16)",
    )
    parity = parser.add_argument_group("parity")
    parity.add_argument("--ops", type=_names(OPS), default=OPS, help=f"of {', '.join(OPS)} (default: all)")
    parity.add_argument("--small", action="store_true", help="small shapes: CPU (always there), compute-sanitizer")
    parity.add_argument("--workers", type=int, help="cases at a time; 1 for compute-sanitizer (default: by cores)")
    bench = parser.add_argument_group("benchmark")
    add_case_arguments(bench)
    bench.add_argument("--bench-ops", type=_names(BENCH_OPS), default=(), help=f"of {', '.join(BENCH_OPS)}")
    bench.add_argument("--q-len", type=int, default=1, help="decode: queries a request (8: verify, no baseline)")
    bench.add_argument(
        "--baseline",
        type=_baselines,
        help="vLLM's times, as scripts/bench_vllm.py writes them (default: on this GPU, or else on an H100)",
    )
    bench.add_argument("--hot", action="store_true", help="one set of inputs, as found in L2")
    return parser.parse_args()


def _names(allowed: tuple[str, ...]):
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name)
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(allowed)}")
        return names

    return parse


def _baselines(text: str) -> Baselines:
    try:
        return Baselines(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def bench(args: argparse.Namespace, deadline: float) -> tuple[bool, str]:
    """The benchmark; returns whether no case failed, and its table."""
    jobs = select_jobs(
        args,
        only_ops=args.bench_ops,
        query_len=args.q_len,
        most_cases=QUICK_CASES if args.quick else None,
        cache_dtypes=("bfloat16", FP8) if args.cache_dtype == "fp8" else ("bfloat16",),
    )
    say(f"benchmark of {args.impl}: {len(jobs)} cases")
    baselines = args.baseline or Baselines(baseline_file(jax.devices()[0].device_kind))
    return run_bench(jobs, args.impl, baselines, args.out, deadline, say, rotate=not args.hot)


def main() -> int:
    """Runs what was asked for."""
    args = arguments()
    deadline = START + args.limit_s
    say(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    tables, fine = [], True
    if args.only != "bench":
        small = args.small or jax.default_backend() == "cpu"
        share = 1.0 if args.only else 0.5  # of the time, when the benchmark follows
        fine, table = run_parity(
            args.impl,
            args.ops,
            args.out,
            START + share * args.limit_s,
            say,
            quick=args.quick,
            small=small,
            workers=args.workers,
            cache_dtype=FP8 if args.cache_dtype == "fp8" else args.cache_dtype,
        )
        tables.append(table)
    if args.only != "parity":
        measured, table = bench(args, deadline)
        fine &= measured
        tables.append(table)
    print("\n" + "\n\n".join(tables))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
