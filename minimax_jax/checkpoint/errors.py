"""The one error of the checkpoint reader and writer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SHOWN_PROBLEMS = 20  # a wrong config makes every one of 23,416 tensors wrong; nobody reads more than this


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, does not fit the configuration, or cannot be written.

    Attributes:
      where: the file or directory.
      problems: every problem found, one line each; the message shows the first 20 and counts the rest.
    """

    def __init__(self, where: str | Path, problems: str | Iterable[str]) -> None:
        self.where = str(where)
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(f"{self.where}: {_listing(self.problems)}")


def _listing(problems: tuple[str, ...]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = [f"{len(problems)} problems", *problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n  ".join(lines)
