"""Where a model directory is: a path, or the name of the embedded checkpoint."""

from __future__ import annotations

from pathlib import Path

TINY = "tiny"


def model_directory(name: str | Path) -> Path:
    """The directory that `name` stands for: "tiny" is the checkpoint inside the package, else a path.

    Raises:
      FileNotFoundError: if it is no directory.
    """
    path = Path(__file__).parent / "tiny_m3" if name == TINY else Path(name).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: no such model directory (give a directory, or {TINY!r} for the embedded one)")
    return path
