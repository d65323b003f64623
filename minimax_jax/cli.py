"""The command `minimax-jax`: arguments, exit codes, errors on one line.

Nothing heavy is imported here, so that `--help` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from minimax_jax.cli_arguments import (
    EXIT_CODES,
    Paragraphs,
    ParserWithArguments,
    add_cache_dtype,
    add_quantization,
    integer,
    number,
)
from minimax_jax.cli_bench import add_bench
from minimax_jax.cli_errors import outcome
from minimax_jax.cli_parallel import add_parallel
from minimax_jax.cli_quantize import add_quantize

OK, PROBLEMS = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (`sys.argv` by default) and returns the exit code; never raises for bad input."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character gets a question mark, not an error
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(argv)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        _discard_stdout()
        return OK
    except (KeyboardInterrupt, ValueError, OSError, MemoryError) as error:
        text, code = outcome(error)
        print(text, file=sys.stderr)
        return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; it raises `ValueError` for bad usage."""
    parser = _Parser(
        prog="minimax-jax",
        description="MiniMax-M3 in JAX: generate text, measure, look into and make checkpoints.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    add_bench(commands)
    _add_inspect(commands)
    add_quantize(commands)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
        code = args.run(args)
    except SystemExit as stop:  # argparse's way to end --help and --version
        code = stop.code if isinstance(stop.code, int) else OK
    sys.stdout.flush()  # a broken pipe must show here, not when the interpreter shuts down
    return code


class _Parser(ParserWithArguments):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from minimax_jax import __version__

        print(f"minimax-jax {__version__}")
        parser.exit()


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt, or answer it with --chat",
        description=(
            "Continue a prompt. Text streams to standard output; when it is complete, one line on standard error "
            "gives prompt tokens, new tokens, time to first token (compilation included) and tokens/s once the "
            "steps are compiled.\n\n"
            "Without --chat the prompt is encoded as it is, with the checkpoint's document-start token (bos_token_id "
            "of config.json) in front if the tokenizer has one and the text does not start with it. Special tokens "
            "written in a prompt become their ids. One line break at the end of a file or of standard input is "
            "not part of the prompt."
        ),
        epilog=EXIT_CODES,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="tiny", metavar="DIR", help="checkpoint directory; tiny: the embedded one (default: tiny)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read standard input)")
    source.add_argument("--prompt-file", metavar="FILE", help="UTF-8 file with the prompt (default: none)")
    add("--chat", action="store_true", help="the prompt is a user's message: apply the chat template (default: off)")
    add("--system", metavar="TEXT", help="with --chat: system message (default: the template's)")
    add(
        "--thinking-mode",
        choices=("enabled", "disabled", "adaptive"),
        help="with --chat: think first, never, or as the model likes (default: the template's, which is adaptive)",
    )
    add(
        "--max-new-tokens",
        type=integer(1),
        metavar="N",
        help="stop after so many (default: the checkpoint's generation_config.json, else 256, or what room there is)",
    )
    add(
        "--temperature",
        type=number("a number >= 0 (0 is greedy)", lambda value: 0 <= value < math.inf),
        metavar="T",
        help="sampling temperature, 0 for greedy (default: generation_config.json; greedy if that names none)",
    )
    add(
        "--top-p",
        type=number("a number in (0, 1]", lambda value: 0 < value <= 1),
        metavar="P",
        help="sample from the likeliest tokens that make up P of the probability (default: generation_config.json, "
        "else 1, which is all); turns sampling on unless --temperature 0",
    )
    add(
        "--top-k",
        type=integer(0),
        metavar="K",
        help="sample from the K likeliest tokens, 0 for all (default: generation_config.json, else 0); "
        "turns sampling on unless --temperature 0",
    )
    add("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="of the random draws (default: 0)")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of weights; auto: bfloat16 on an accelerator, float32 on a CPU (default: auto)",
    )
    add_cache_dtype(parser)
    add_quantization(parser)
    add(
        "--execution",
        choices=("auto", "segmented", "whole", "eager"),
        default="auto",
        help="how steps run: prompts as compiled segments around host-side attention, as one executable, or "
        "everything as segments at exact sizes, uncaptured; auto takes the fastest (default: auto)",
    )
    add("--ignore-eos", action="store_true", help="go on after end-of-text tokens (default: stop there)")
    add("--json", action="store_true", help="print one JSON object at the end instead of streaming (default: off)")
    add_parallel(parser)
    parser.set_defaults(run=_generate)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what a checkpoint is, needs and lacks",
        description=(
            "Show a checkpoint's configuration, parameters by component, stored bytes, memory per device under "
            "tensor parallelism (TP), cache bytes per token, and every tensor or file that is missing, unexpected or "
            "broken."
        ),
        epilog=EXIT_CODES,
        formatter_class=Paragraphs,
        allow_abbrev=False,
    )
    parser.add_argument(
        "directory",
        metavar="DIR",
        help="checkpoint directory; tiny: the embedded one; m3, m3-mxfp8: the released models' built-in "
        "configurations, without files",
    )
    parser.add_argument(
        "--check", action="store_true", help="read every value and name tensors with NaN or infinities (default: off)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables (default: off)")
    parser.set_defaults(run=_inspect)


def _generate(args: argparse.Namespace) -> int:
    from minimax_jax.cli_generate import run_generate

    return run_generate(args)


def _inspect(args: argparse.Namespace) -> int:
    from minimax_jax.inspect_report import inspect_model, render_json
    from minimax_jax.inspect_text import render_text

    report = inspect_model(args.directory, read_values=args.check)
    print(render_json(report) if args.json else render_text(report))
    return OK if report.ok else PROBLEMS


def _discard_stdout() -> None:
    """Points stdout at nothing, or the interpreter's last flush would complain about the broken pipe."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
