#!/usr/bin/env python3
"""Products with MXFP8 weights on one GPU: right, how fast, and with which launch parameters.

  python scripts/bench_products.py --out results            one H100: about three minutes
  python scripts/bench_products.py --out results --write    and into the package's table
  python scripts/bench_products.py --interpret --shrink 4 --tokens 1 --quick    a try on a CPU

Shapes of one TP8 and EP8 rank of MiniMax-M3: QKV and index projections in one launch, output projection, shared and
dense MLP, and the rank's 16 experts with rows as random routing deals them. First every e4m3 byte under every scale,
and the whole of routed_experts, add_norm and choose_experts, are compared with the references. Each candidate launch is
compared with the reference in float32, by the error that bfloat16 itself has there, and timed over more inputs than a
cache holds, after everything is compiled. Floors are bytes over the measured copy bandwidth and FLOPs over the measured
bf16 matmul rate. Writes products.json and measured_products.py to --out, anew after every case. Exit status: 0, or 1
when a case is wrong, refused by all launches or left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.products.cases import TOKENS, all_cases  # noqa: E402
from benchmarks.products.checks import check_layer_ops  # noqa: E402
from benchmarks.products.run import run_cases  # noqa: E402
from minimax_jax.rank_slice.ceilings import Ceilings, measure_ceilings  # noqa: E402
from minimax_kernels.measured_products import PRODUCTS  # noqa: E402

TABLE = Path("kernels/minimax_kernels/measured_products.py")


def main() -> int:
    """Runs the cases and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("products"), help="directory for the results (default: products)")
    add(
        "--tokens",
        default=",".join(map(str, TOKENS)),
        help="of a step, comma-separated, in this order (default: %(default)s)",
    )
    add("--bf16", action="store_true", help="experts with bfloat16 weights too (default: off)")
    add("--mosaic", action="store_true", help="experts of many rows on Mosaic GPU too (default: off)")
    add("--quick", action="store_true", help="the formula's or table's own launch only (default: all candidates)")
    add(
        "--limit-s",
        type=float,
        default=240,
        help="begin no case after so many seconds; half of them may compile (default: 240)",
    )
    add("--write", action="store_true", help="put what was measured into the package's table (default: off)")
    add("--interpret", action="store_true", help="in Pallas's interpreter (a try without a GPU)")
    add("--shrink", type=int, choices=(1, 2, 4), default=1, help="divide all widths (a try without a GPU; default: 1)")
    args = parser.parse_args()
    if args.write and (args.shrink > 1 or args.interpret or args.quick):
        parser.error("--write: not with --quick, --shrink or --interpret: they do not measure what the table is for")
    if jax.default_backend() != "gpu" and not args.interpret:
        parser.error(f"this is a {jax.default_backend()}: pass --interpret for a try without a GPU")
    tokens = tuple(int(part) for part in args.tokens.split(","))

    def say(text: str) -> None:
        print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)

    ceilings = Ceilings(1e9, 1e9) if args.interpret else measure_ceilings()
    say(f"copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, matmul {ceilings.matmul_flop_per_s / 1e12:.0f} TFLOP/s")
    cases = all_cases(tokens, bf16=args.bf16, mosaic=args.mosaic, shrink=args.shrink)
    suffix = "_interpret" if args.interpret else ""
    mosaic = f"pallas_mosaic_gpu{suffix}" if args.mosaic else ""
    failures = check_layer_ops(f"pallas_triton{suffix}", args.shrink, say, mosaic)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe_machine(), "ceilings": dataclasses.asdict(ceilings), "failed_checks": failures}

    def save(best: dict, rows: list) -> None:
        text = json.dumps({**record, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"
        replace_file(args.out / "products.json", text)
        replace_file(args.out / TABLE.name, table_text({**PRODUCTS, **best}))

    save({}, [])
    best, rows = run_cases(
        cases, ceilings, START + args.limit_s, say, save=save, interpret=args.interpret, quick=args.quick
    )  # fmt: skip
    if args.write:
        replace_file(ROOT / TABLE, table_text({**PRODUCTS, **best}))
    wrong = sorted({f"{row.case}, {row.launch}: {row.refused}" for row in rows if row.refused.startswith("wrong")})
    for line in (*failures, *wrong):
        say(line)
    say(f"wrote {args.out}/products.json and {args.out}/{TABLE.name}")
    return (
        0 if not wrong and not failures and len({row.case for row in rows if row.us is not None}) == len(cases) else 1
    )


def replace_file(path: Path, text: str) -> None:
    """Writes a file that is whole at any time."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def table_text(products: dict) -> str:
    """The table's file."""
    about = describe_machine()
    head = (ROOT / TABLE).read_text(encoding="utf-8").split('"""')[1].split("\n\nLatest on")[0].rstrip()
    lines = "".join(f"    {key!r}: {value!r},\n" for key, value in sorted(products.items())).replace("'", '"')
    latest = f"Latest on {about['device']}, driver {about['driver']}, jax {about['jax']}, {about['date']}."
    return (
        f'"""{head}\n\n{latest}\n"""\n\n'
        "Table = dict[tuple[str, str, int, int, int, int], tuple[int, int, int, int, int, int]]\n\n"
        f"PRODUCTS: Table = {{\n{lines}}}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
