"""Prompts that stand in a file, one on each line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from minimax_jax.engine.prompts import document_ids
from minimax_jax.llm import LLM


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers.

    Raises:
      ValueError: if the file cannot be read, is no UTF-8 text or has no such line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"--prompt-file {path}: must be UTF-8 text, and is not at byte {error.start}, in line {line}"
        ) from None
    except OSError as error:
        raise ValueError(f"--prompt-file {path}: {error.strerror or error}") from None
    # not `splitlines`, which ends lines at characters that JSON and web texts have within them
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {path}: must have at least one line that is not empty")
    return lines


def check_lengths(llm: LLM, lines: Iterable[tuple[int, str]], output_len: int, path: Path) -> None:
    """Raises ValueError for a line that leaves less room than an answer needs, before minutes are spent on others."""
    most = llm.max_seq_len - output_len
    for number, text in lines:
        count = len(document_ids(llm.tokenizer, text, llm.model.config))
        if count > most:
            raise ValueError(
                f"--prompt-file {path}: line {number} has {count} tokens: must be at most {most}, which leaves room "
                f"for --output-len {output_len}"
            )
