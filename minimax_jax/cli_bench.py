"""`minimax-jax bench`: its arguments. What it does is in `serving_bench.py`; nothing heavy is imported here."""

from __future__ import annotations

import argparse
from pathlib import Path

from minimax_jax.cli_arguments import (
    EXIT_CODES,
    OwnOptions,
    Paragraphs,
    add_cache_dtype,
    add_quantization,
    integer,
    integers,
)
from minimax_jax.cli_parallel import add_parallel
from minimax_jax.cli_rank_slice import add_rank_slice


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="measure throughput and latency",
        description=(
            "Measure the engine: latency by batch and prompt length (time to the first token, time per token after "
            "it), and offline throughput over many prompts at once. Everything runs once to compile and then again for "
            "the times. All requests take exactly --output-len greedy tokens.\n\n"
            "Writes bench.json and, if matplotlib is installed, bench.png to --out; prints a table."
        ),
        epilog=EXIT_CODES,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="tiny", metavar="DIR", help="checkpoint directory; tiny: the embedded one (default: tiny)")
    add("--batch-sizes", type=integers(1), default=(1, 4, 16), metavar="N,N", help="for latency (default: 1,4,16)")
    add("--input-lens", type=integers(1), default=(32, 256), metavar="N,N", help="prompt tokens (default: 32,256)")
    add("--output-len", type=integer(2), default=32, metavar="N", help="new tokens of a request (default: 32)")
    add("--num-prompts", type=integer(0), default=64, metavar="N", help="for throughput; 0 for none (default: 64)")
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="UTF-8 file with one prompt a line, for throughput (default: random tokens of the longest --input-lens)",
    )
    add("--repeats", type=integer(1), default=3, metavar="N", help="timed runs; the median counts (default: 3)")
    add("--max-batch-size", type=integer(1), default=64, metavar="N", help="sequences at once (default: 64)")
    add("--max-num-tokens", type=integer(1), default=8192, metavar="N", help="tokens of a step (default: 8192)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of weights (default: auto)")
    add_cache_dtype(parser)
    add_quantization(parser)
    add(
        "--steps-per-launch",
        type=_steps,
        default="auto",
        metavar="N",
        help="decode steps of one executable; auto: 16 on a GPU, 1 on a CPU (default: auto)",
    )
    add("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="of the random prompts (default: 0)")
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="folder for the results (default: bench)")
    add_parallel(parser)
    parser.set_defaults(run=_bench)
    benchmarks = parser.add_subparsers(
        action=OwnOptions, dest="benchmark", metavar="BENCHMARK", title="other benchmarks"
    )
    add_rank_slice(benchmarks)


def _steps(text: str) -> int | str:
    return text if text == "auto" else integer(1, 256)(text)


def _bench(args: argparse.Namespace) -> int:
    from minimax_jax.serving_bench import run_bench

    return run_bench(args)
