"""Reads one safetensors file through a memory map: the header is checked whole, then tensors are views.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, a JSON header of
name -> {dtype, shape, data_offsets}, then the data without holes). The library's own reader has no
F8_E8M0 in NumPy and answers a bad header without saying which tensor is at fault.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

import ml_dtypes
import numpy as np

from minimax_jax.checkpoint.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_EXTENT = 1 << 48  # beyond any file; keeps every product of extents within what NumPy accepts


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `num_bytes` in the file, `dtype` in safetensors' spelling."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """One safetensors file, memory-mapped. A context manager; views that were handed out stay valid after it.

    Raises:
      CheckpointError: if the file cannot be opened, is truncated or too long, or its header is wrong in any
        way (length, JSON, dtype, shape, offsets); names the file and, where one is at fault, the tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(file, size)
                self._entries = _parse_entries(header, data_start, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(self.path, f"cannot be opened ({error.strerror or error})") from None
        except _Malformed as error:
            raise CheckpointError(self.path, str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the map; the system unmaps it when the last view dies."""
        self._map = None

    def names(self) -> tuple[str, ...]:
        """All tensor names, in the order of their data."""
        return tuple(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor lies and what it is."""
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(self.path, f"{name}: no such tensor") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """The stored dtype in safetensors' spelling, a key of `DTYPES`."""
        return self.entry(name).dtype

    def read(self, name: str, index: Any = None) -> np.ndarray:
        """A read-only NumPy view of the tensor, or of `tensor[index]`; only pages that are touched are read.

        Args:
          name: the tensor.
          index: anything that NumPy's basic indexing takes (slices and integers), or None for all of it.
        """
        entry = self.entry(name)
        if self._map is None:
            raise CheckpointError(self.path, "already closed")
        flat = np.frombuffer(self._map, np.uint8, count=entry.num_bytes, offset=entry.start)
        whole = flat.view(DTYPES[entry.dtype]).reshape(entry.shape)
        return whole if index is None else whole[index]

    def release(self, name: str) -> None:
        """Drops the tensor's pages from this process's memory; a later read fetches them again."""
        entry = self.entry(name)
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of this tensor only
        length = (entry.start + entry.num_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


class _Malformed(Exception):
    """What is wrong with a header; the caller adds the file."""


def _read_header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset at which the data starts."""
    prefix = file.read(8)
    if prefix == b"version ":
        raise _Malformed("a Git LFS pointer, not the file it stands for (fetch it with `git lfs pull`)")
    if len(prefix) < 8:
        raise _Malformed(f"{size} bytes: too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER:
        raise _Malformed(f"header length {length}: must be at most {_MAX_HEADER}; not a safetensors file?")
    if 8 + length > size:
        raise _Malformed(f"header length {length}, but the file has only {size - 8} bytes after it (truncated?)")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and endless digits
        raise _Malformed(f"header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _Malformed(f"header is a JSON {type(header).__name__}: must be an object")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, following in itertools.pairwise(keys) if key == following)
        raise _Malformed(f"{twice}: stands twice in the header")
    return result


def _parse_entries(header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorEntry]:
    """Every tensor, in the order of the data, which must be filled without holes or overlaps."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("__metadata__: must map strings to strings")
    parsed = [(name, _parse_entry(name, raw)) for name, raw in header.items()]
    entries = sorted(
        parsed, key=lambda item: (item[1].start, item[1].num_bytes)
    )  # an empty tensor before its neighbour
    end = 0
    for name, entry in entries:
        if entry.start != end:
            raise _Malformed(f"{name}: data starts at {entry.start}: must be {end}, where the tensor before it ends")
        end += entry.num_bytes
        if data_start + end > size:
            raise _Malformed(f"{name}: data ends at byte {data_start + end}, but the file has {size} (truncated)")
    if data_start + end != size:
        raise _Malformed(f"{size - data_start - end} bytes after the last tensor: the file must end with it")
    return {name: dataclasses.replace(entry, start=data_start + entry.start) for name, entry in entries}


def _parse_entry(name: str, raw: Any) -> TensorEntry:
    if not isinstance(raw, dict):
        raise _Malformed(f"{name}: header entry is {raw!r:.80}: must be an object")
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Malformed(f"{name}: dtype {dtype!r:.80}: must be one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 32 or any(extent > _MAX_EXTENT for extent in shape):
        raise _Malformed(f"{name}: shape {shape!r:.80}: must be a list of sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise _Malformed(f"{name}: data_offsets {offsets!r:.80}: must be [begin, end]")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise _Malformed(f"{name}: data_offsets {offsets} hold {end - begin} bytes, {dtype} {shape} needs {needed}")
    if needed == 0 and math.prod(extent for extent in shape if extent) > _MAX_EXTENT:
        raise _Malformed(f"{name}: shape {shape!r:.80}: impossible")
    return TensorEntry(dtype, tuple(shape), begin, needed)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of integers >= 0 (JSON's true and 1.0 are neither)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
