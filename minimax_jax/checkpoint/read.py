"""Builds one state tensor, or a range of it, on the host from the file tensors that tile it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import Executor

import numpy as np

from minimax_jax.checkpoint.files import CheckpointFiles
from minimax_jax.checkpoint.mxfp8 import dequantize_mxfp8
from minimax_jax.checkpoint.names import Range, Read, StateTensor
from minimax_jax.checkpoint.verify import MXFP8_VALUES
from minimax_jax.tensor_table import MXFP8_BLOCK, SCALE_SUFFIX

_JOB_ELEMENTS = 1 << 22  # what one thread does before the file's pages are dropped again
_CACHE_LINE = 64  # a transposed write of this many bytes at a time is six times as fast as row by row


def read_state_tensor(
    files: CheckpointFiles,
    tensor: StateTensor,
    dtype: np.dtype,
    ranges: tuple[Range, ...] | None = None,
    executor: Executor | None = None,
) -> np.ndarray:
    """`state[tensor.name][ranges]` in `dtype`: a fresh array, the only large allocation made.

    Floats are cast rounding to nearest even; MXFP8 weights are multiplied out in float32 first, or with a dtype of one
    byte left as they are. Only the file's pages under `ranges` are read, and they leave this process's memory again.

    Args:
      files: the checkpoint; `compare` must have found nothing wrong with this tensor.
      tensor: which one.
      dtype: bfloat16 or float32; float8_e4m3fn for the values of an MXFP8 tensor, uint8 for its scales.
      ranges: half-open, one per axis of the state tensor; None for all of it.
      executor: threads to share the work, None to do it here.
    """
    if ranges is None:
        ranges = tuple((0, extent) for extent in tensor.shape)
    out = np.empty([high - low for low, high in ranges], dtype)
    jobs = (job for read in tensor.reads(ranges) for job in _jobs(files, read, out))
    if executor is None:
        for job in jobs:
            job()
    else:
        for future in [executor.submit(job) for job in jobs]:
            future.result()
    return out


def _jobs(files: CheckpointFiles, read: Read, out: np.ndarray) -> Iterator[functools.partial]:
    """Copies of at most about `_JOB_ELEMENTS`, each into its own part of `out`."""
    target = out[read.target]
    if read.transposed:
        target = np.swapaxes(target, -1, -2)
    if target.ndim == 3:  # stacked experts
        first = read.file_index[0].start
        for expert, part in enumerate(target):
            yield from _row_jobs(files, read.piece.name, (first + expert,), read.file_index[1:], part)
    else:
        yield from _row_jobs(files, read.piece.name, (), read.file_index, target)


def _row_jobs(
    files: CheckpointFiles, name: str, lead: tuple[int, ...], index: tuple[slice, ...], target: np.ndarray
) -> Iterator[functools.partial]:
    rows, start = len(target), index[0].start
    step = max(1, _JOB_ELEMENTS * rows // max(1, target.size))
    for row in range(0, rows, step):
        stop = min(row + step, rows)
        part = (slice(start + row, start + stop), *index[1:])
        yield functools.partial(_copy, files, name, lead, part, target[row:stop])


def _copy(
    files: CheckpointFiles, name: str, lead: tuple[int, ...], index: tuple[slice, ...], target: np.ndarray
) -> None:
    """`target[...] = file[lead][index]`, a strip of rows at a time: temporaries stay in the processor's cache."""
    raw = target.dtype.itemsize == 1
    quantised = files.dtype(name) == MXFP8_VALUES and not raw
    strip = max(1, _CACHE_LINE // target.dtype.itemsize) if target.ndim == 2 else len(target)
    bits = np.dtype(f"u{target.dtype.itemsize}")
    first = index[0].start
    for row in range(0, len(target), strip):
        part = (slice(first + row, min(first + row + strip, index[0].stop)), *index[1:])
        source = _dequantised(files, name, *part) if quantised else files.read(name, (*lead, *part))
        # As plain integers, because NumPy copies those several times faster than ml_dtypes' bfloat16.
        values = source if raw else source.astype(target.dtype, copy=False)
        np.copyto(target[row : row + strip].view(bits), values.view(bits))
    files.release(name)
    if quantised:
        files.release(name + SCALE_SUFFIX)


def _dequantised(files: CheckpointFiles, name: str, rows: slice, inputs: slice) -> np.ndarray:
    """float32 of a range of an MXFP8 weight; the range is widened to whole blocks and cut again."""
    first, last = inputs.start // MXFP8_BLOCK, -(-inputs.stop // MXFP8_BLOCK)
    values = files.read(name, (rows, slice(first * MXFP8_BLOCK, last * MXFP8_BLOCK)))
    scales = files.read(name + SCALE_SUFFIX, (rows, slice(first, last)))
    wide = dequantize_mxfp8(np.ascontiguousarray(values), np.ascontiguousarray(scales))
    return wide[:, inputs.start - first * MXFP8_BLOCK : inputs.stop - first * MXFP8_BLOCK]
