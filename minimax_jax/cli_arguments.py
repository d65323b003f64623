"""What the arguments of all subcommands share: types, the layout of help, exit codes. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

EXIT_CODES = """\
exit codes:
  0    done
  1    inspect: the checkpoint has problems; bench rank-slice: a case failed or was left out
  2    bad usage or bad input; one line on standard error says what
  3    with several processes: one of them was lost, and all have ended
  130  interrupted with Ctrl-C; quantize: by SIGTERM or SIGHUP as well"""


class Paragraphs(argparse.RawDescriptionHelpFormatter):
    """Wraps each paragraph of a description; epilogues stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text == EXIT_CODES:
            return super()._fill_text(text, width, indent)
        fill = super(argparse.RawDescriptionHelpFormatter, self)._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))


class ParserWithArguments(argparse.ArgumentParser):
    """A parser that remembers what it was given, for `OwnOptions`."""

    arguments: tuple[str, ...] = ()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        self.arguments = tuple(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)


class OwnOptions(argparse._SubParsersAction):
    """Subcommands that take none of the options of the command above them, a `ParserWithArguments`.

    Options in front of their name, which argparse would drop, are an error, and that command's defaults are not in
    what is parsed.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """As argparse's."""
        before = parser.arguments[: len(parser.arguments) - len(values)]
        if before:
            parser.error(f"{' '.join(before)}: {values[0]} has options of its own: they must come after its name")
        for name in list(vars(namespace)):
            delattr(namespace, name)
        super().__call__(parser, namespace, values, option_string)


def add_cache_dtype(parser: argparse.ArgumentParser) -> None:
    """The option `--cache-dtype`, the names of `minimax_jax.cache.CACHE_DTYPES`."""
    parser.add_argument(
        "--cache-dtype",
        choices=("auto", "bfloat16", "float32", "fp8"),
        default="auto",
        help="of keys and values; fp8: e4m3, half of bfloat16's bytes; auto: the weights' (default: auto)",
    )


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument type: integers in a range."""
    allowed = f"an integer >= {least}" if most is None else f"an integer within {least}..{most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


def number(allowed: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argument type: numbers for which `holds`, which `allowed` puts in words."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """The option `--quantization` of commands that load a checkpoint."""
    parser.add_argument(
        "--quantization",
        choices=("auto", "none"),
        default="auto",
        help="auto: weights of an MXFP8 checkpoint stay in 8 bits; none: they are multiplied out while loading "
        "(default: auto)",
    )


def integers(least: int) -> Callable[[str], tuple[int, ...]]:
    """An argument type: integers with commas between them."""
    each = integer(least)

    def parse(text: str) -> tuple[int, ...]:
        return tuple(each(part) for part in text.split(","))

    return parse
