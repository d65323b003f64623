"""A checkpoint's safetensors files as one set of tensors: a single file, an index, or whatever lies there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from minimax_jax.checkpoint.errors import CheckpointError
from minimax_jax.checkpoint.safetensors_reader import SafetensorsFile

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """All tensors of a directory; `files` maps each tensor to the open file that holds it."""

    directory: Path
    files: dict[str, SafetensorsFile]

    @classmethod
    def open(cls, directory: str | Path) -> CheckpointFiles:
        """Opens `model.safetensors`, else what `model.safetensors.index.json` lists, else every `*.safetensors`.

        Raises:
          CheckpointError: if there is none, or a shard is missing or malformed, or the index and the shards
            disagree, or two files hold one tensor; one error lists all of it.
        """
        opened, problems = scan_directory(directory)
        if problems:
            raise CheckpointError(directory, problems)
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def close(self) -> None:
        """Closes every file; see `SafetensorsFile.close`."""
        for file in self.files.values():
            file.close()

    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> str:
        """The stored dtype in safetensors' spelling."""
        return self._file(name).dtype(name)

    def num_bytes(self, name: str) -> int:
        """Bytes as stored."""
        return self._file(name).entry(name).num_bytes

    def read(self, name: str, index: Any = None) -> np.ndarray:
        """A read-only view of the tensor or of `tensor[index]`; see `SafetensorsFile.read`."""
        return self._file(name).read(name, index)

    def release(self, name: str) -> None:
        """Drops the tensor's pages from this process's memory."""
        self._file(name).release(name)

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self.files[name]
        except KeyError:
            raise CheckpointError(self.directory, f"{name}: no such tensor") from None


def scan_directory(directory: str | Path) -> tuple[CheckpointFiles, list[str]]:
    """What can be opened, and every problem on the way (none: the checkpoint's files are sound)."""
    directory = Path(directory)
    problems: list[str] = []
    if not directory.is_dir():
        return CheckpointFiles(directory, {}), ["no such directory"]
    index: dict[str, str] | None = None
    if (directory / SINGLE_NAME).exists():  # transformers' order of preference
        paths = [directory / SINGLE_NAME]
    elif (directory / INDEX_NAME).exists():
        index = _read_index(directory / INDEX_NAME, problems)
        paths = [directory / name for name in sorted(set(index.values()))]
    else:
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            problems.append(f"no weights: neither {SINGLE_NAME}, nor {INDEX_NAME}, nor any *.safetensors")

    files: dict[str, SafetensorsFile] = {}
    bad: set[str] = set()
    for path in paths:
        try:
            file = SafetensorsFile(path)
        except CheckpointError as error:
            problems += [f"{path.name}: {problem}" for problem in error.problems]
            bad.add(path.name)
            continue
        for name in file.names():
            if name in files:
                problems.append(f"{name}: in both {files[name].path.name} and {path.name}")
            elif index is not None and name not in index:
                problems.append(f"{name}: in {path.name}, but {INDEX_NAME} does not name it")
            files.setdefault(name, file)
    for name, shard in (index or {}).items():
        if shard not in bad and (name not in files or files[name].path.name != shard):
            problems.append(f"{name}: not in {shard}, where {INDEX_NAME} places it")
    return CheckpointFiles(directory, files), problems


def _read_index(path: Path, problems: list[str]) -> dict[str, str]:
    """tensor name -> file name; empty, with a problem noted, if the index cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: not readable as JSON ({error})")
        return {}
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f'{path.name}: "weight_map" must map tensor names to file names')
        return {}
    usable: dict[str, str] = {}
    for name, shard in weight_map.items():
        # An index comes from outside: it must not reach for files beside the checkpoint.
        if isinstance(shard, str) and shard == Path(shard).name and shard.endswith(".safetensors"):
            usable[name] = shard
        else:
            problems.append(f"{path.name}: {name} is in {shard!r}: must be a *.safetensors file of this directory")
    return usable
