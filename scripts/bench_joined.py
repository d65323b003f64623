#!/usr/bin/env python3
"""What a decode layer does after attention, joined into fewer launches: equal to the parts, and how much faster.

  python scripts/bench_joined.py --out results                     one H100, under two minutes
  python scripts/bench_joined.py --out /tmp/try --interpret --shrink 8 --tokens 7    a try on a CPU, without times

The router (`route_tokens`), the shared expert's [gate | up] (`matmul` with its activation) and the routed experts with
an addend, of one TP8 and EP8 rank of MiniMax-M3, each beside the operations that it replaces. Writes joined.json to
--out. Exit status: 0, or 1 when something differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import minimax_kernels as mk  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.products.cases import EXPERT_WIDTH, EXPERTS, HIDDEN, LOCAL, PER_TOKEN  # noqa: E402
from benchmarks.products.errors import measure_errors, upcast  # noqa: E402
from benchmarks.products.weights import random_mxfp8  # noqa: E402
from benchmarks.timing import calls_and_rounds, compile_calls, time_compiled  # noqa: E402

ACTIVATION = mk.Swiglu(1.702, 1.0, 7.0)
SETS = 16  # of the small weights, more than the second-level cache holds
ROUNDING = 2**-6  # of bfloat16 results whose sums were in different orders
Part = tuple[Callable[..., Any], Callable[..., Any], list[tuple[Any, ...]]]  # joined, composed, sets of arguments


def main() -> int:
    """Checks, times and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for joined.json")
    parser.add_argument("--tokens", default="1,8,32,64", help="comma-separated, 64 at most (default: %(default)s)")
    parser.add_argument("--shrink", type=int, default=1, choices=(1, 2, 4, 8), help="divides sizes (default: 1)")
    parser.add_argument("--interpret", action="store_true", help="Pallas's interpreter: checks only")
    args = parser.parse_args()
    if jax.default_backend() != "gpu" and not args.interpret:
        parser.error(f"this is a {jax.default_backend()}: pass --interpret for a try without a GPU")
    tokens = [int(part) for part in args.tokens.split(",")]
    if not all(0 < count <= 64 for count in tokens):
        parser.error(f"--tokens: {args.tokens}: must be between 1 and 64 each")
    impl = "pallas_triton_interpret" if args.interpret else "pallas_triton"
    rows = []
    for count in tokens:
        for name, (joined, composed, sets) in _parts(impl, count, args.shrink, 1 if args.interpret else SETS).items():
            found, expected = jax.jit(joined)(*sets[0]), jax.jit(composed)(*sets[0])
            row: dict[str, Any] = {
                "part": name,
                "tokens": count,
                "difference": measure_errors(found, upcast(expected)).largest,
            }
            if not args.interpret:
                for way, function in (("joined_us", joined), ("composed_us", composed)):
                    calls, rounds = calls_and_rounds(1e-5, len(sets))
                    compiled = compile_calls(function, sets[0], calls, rounds=rounds)
                    row[way] = time_compiled(compiled, sets, calls, rounds=rounds).us
            rows.append(row)
            print(f"[{time.monotonic() - START:6.1f} s] {row}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe_machine(), "rows": rows}
    (args.out / "joined.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(not row["difference"] <= ROUNDING for row in rows))


def _parts(impl: str, tokens: int, shrink: int, count: int) -> dict[str, Part]:
    hidden, width = HIDDEN // shrink, EXPERT_WIDTH // shrink
    keys = jax.random.split(jax.random.key(tokens), 5)
    x, addend = (jax.random.normal(key, (tokens, hidden), jnp.bfloat16) for key in keys[:2])
    bias, choice = jnp.linspace(-0.2, 0.2, EXPERTS), {"num_chosen": PER_TOKEN, "scale": 2.0, "impl": impl}

    def routed_in_parts(x: Any, w: Any) -> Any:
        return mk.choose_experts(mk.matmul(x.astype(jnp.float32), w), bias, **choice)[1]

    routers = [(x, jax.random.normal(key, (hidden, EXPERTS)) / 64) for key in jax.random.split(keys[2], count)]
    shared = [(x, random_mxfp8(key, (hidden, 768))) for key in jax.random.split(keys[3], count)]
    product = functools.partial(mk.matmul, impl=impl)
    experts = functools.partial(mk.routed_experts, activation=ACTIVATION, num_experts=EXPERTS, impl=impl)
    ids, weights = mk.choose_experts(routers[0][0][:, :EXPERTS].astype(jnp.float32), bias, **choice)
    held = random_mxfp8(keys[4], (LOCAL, hidden, 2 * width)), random_mxfp8(keys[4], (LOCAL, width, hidden))
    return {
        "router": (lambda x, w: mk.route_tokens(x, w, bias, **choice)[1], routed_in_parts, routers),
        "gate_up": (
            functools.partial(product, activation=ACTIVATION), lambda x, w: ACTIVATION.halves(product(x, w)), shared
        ),
        "experts": (experts, lambda *args: experts(*args[:-1]) + args[-1], [(x, ids, weights, *held, addend)]),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
