"""`minimax-jax bench rank-slice`: its arguments; `rank_slice/` does the work. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minimax_jax.cli_arguments import EXIT_CODES, Paragraphs, add_cache_dtype, integer, integers

_DEFAULTS = {"layers": 60, "batch": (1, 32, 64), "context": (8192, 32768), "chunk": 8192, "prefix": (0, 57344)}
_TINY = {"layers": 3, "batch": (1, 2), "context": (64,), "chunk": 64, "prefix": (0, 64)}


def add_rank_slice(benchmarks: argparse._SubParsersAction) -> None:
    """Adds the subcommand of `bench`."""
    parser = benchmarks.add_parser(
        "rank-slice",
        help="measure one rank's slice of the full MiniMax-M3, alone on a device",
        description=(
            "Measure what one rank of a spread MiniMax-M3 takes for its steps: its slice of the weights, random and "
            "drawn on the device, caches filled to a context with random numbers, decode steps and chunks of prompts "
            "through the engine. Collectives are local copies of the same size: what the ranks would wait for each "
            "other is not in the times.\n\n"
            "The floor of a step is its weights' and caches' bytes over the copy bandwidth, or its FLOPs over the "
            "bfloat16 matmul rate, both measured in the same run.\n\n"
            "Writes rank_slice.json after each case and, if matplotlib is installed, rank_slice.png to --out; prints a "
            "table."
        ),
        epilog=EXIT_CODES,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tp", type=integer(1), default=8, metavar="N", help="tensor-parallel ranks (default: 8)")
    add("--ep", type=integer(1), default=8, metavar="N", help="expert-parallel ranks (default: 8)")
    add("--rank", type=integer(0), default=0, metavar="N", help="whose slice (default: 0)")
    add(
        "--layers",
        type=integer(1),
        metavar="N",
        help="how many of the model's layers; of few, the last is sparse (default: 60)",
    )
    add("--batch", type=integers(1), metavar="N,N", help="requests of decode steps (default: 1,32,64)")
    add("--context", type=integers(1), metavar="N,N", help="tokens in their caches (default: 8192,32768)")
    add(
        "--launch-steps",
        type=integers(1),
        metavar="N,N",
        help="decode steps a launch to try, on a GPU each with and without CUDA graphs; the fastest counts (default: 1 "
        "and the engine's own)",
    )
    add("--chunk", type=integer(1), metavar="N", help="tokens of a prompt's chunk (default: 8192)")
    add("--prefix", type=integers(0), metavar="N,N", help="tokens before it (default: 0,57344)")
    add("--only", choices=("prefill", "decode"), help="chunks of prompts or decode steps alone (default: both)")
    add(
        "--routing",
        choices=("uniform", "skewed"),
        default="uniform",
        help="whether routers choose all experts alike or favour some (default: uniform)",
    )
    add("--weights", choices=("mxfp8", "bf16"), default="mxfp8", help="of linears and experts (default: mxfp8)")
    add_cache_dtype(parser)
    add("--limit-s", type=integer(1), default=330, metavar="N", help="start no case after N seconds (default: 330)")
    add("--seed", type=integer(0, 2**31 - 1), default=0, metavar="N", help="of weights and pages (default: 0)")
    add("--out", type=Path, default=Path("rank-slice"), metavar="DIR", help="for the results (default: rank-slice)")
    add("--tiny", action="store_true", help="a small model and small sizes, to try it on a CPU (default: off)")
    parser.set_defaults(run=_rank_slice)


def _rank_slice(args: argparse.Namespace) -> int:
    for name, value in (_TINY if args.tiny else _DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    # read when jax starts: of 80 GB three quarters, JAX's default, do not hold the weights and the pages
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from minimax_jax.rank_slice.measure import run_rank_slice

    return run_rank_slice(args)
