"""`minimax-jax quantize`: its arguments; `checkpoint/quantize.py` does the work. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import signal
import time
from types import FrameType

from minimax_jax.cli_arguments import EXIT_CODES, Paragraphs


def add_quantize(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "quantize",
        help="make an MXFP8 checkpoint from one in floats",
        description=(
            "Make an MXFP8 checkpoint in the layout of the released MiniMax-M3-MXFP8 from one in floats, of the "
            "vendor's or transformers' names: linears and routed experts become 8-bit values (e4m3) that share a scale "
            "(a power of two) per 32 inputs; embeddings, head, norms and routers stay as they are.\n\n"
            "The same input gives the same bytes. OUT appears when it is whole; an interrupted run "
            "(Ctrl-C, SIGTERM, SIGHUP) leaves nothing, and what a killed one left goes with the next run to OUT."
        ),
        epilog=EXIT_CODES,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DIR", help="checkpoint directory; tiny: the embedded one")
    parser.add_argument("out_directory", metavar="OUT", help="where to; must be a new or an empty directory")
    parser.add_argument("--format", choices=("mxfp8",), default="mxfp8", help="of the weights (default: mxfp8)")
    parser.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> int:
    from minimax_jax.checkpoint.quantize import quantize_checkpoint

    start = time.perf_counter()
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        done = quantize_checkpoint(args.directory, args.out_directory)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(
        f"{done.directory}: {done.tensors} tensors quantised, {done.bytes_before / 1e9:.3f} GB are "
        f"{done.bytes_after / 1e9:.3f} GB, in {time.perf_counter() - start:.1f} s"
    )
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends as Ctrl-C does; a second signal does not disturb the cleaning up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
