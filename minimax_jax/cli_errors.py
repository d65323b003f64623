"""What the command line makes of an exception: one line and an exit code. Imports nothing heavy."""

from __future__ import annotations

import traceback

BAD_INPUT, INTERRUPTED, BUG = 2, 130, 1
_SHOWN_PROBLEMS = 3  # of a checkpoint that does not load; `inspect` lists them all


def outcome(error: BaseException) -> tuple[str, int]:
    """(what to print, exit code): a line for what users can put right, a traceback for bugs."""
    if isinstance(error, KeyboardInterrupt):
        return "\nminimax-jax: interrupted", INTERRUPTED
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return f"minimax-jax: error: {_one_line(error)}", BAD_INPUT
    return "".join(traceback.format_exception(error)).rstrip(), BUG


def _one_line(error: Exception) -> str:
    """What an error says, on one line: a list of problems is joined, and shortened if it is a checkpoint's."""
    problems = getattr(error, "problems", ())  # a CheckpointError's; importing that class here would cost time
    if len(problems) > 1:
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        rest = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        where = getattr(error, "where", "checkpoint")
        text = f"{where}: {len(problems)} problems: {shown}{rest} (`minimax-jax inspect` lists all)"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ")
