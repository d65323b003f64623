"""Loads a checkpoint onto a device: everything is verified first, then one state tensor at a time streams in."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np

from minimax_jax.checkpoint.errors import CheckpointError
from minimax_jax.checkpoint.files import CheckpointFiles
from minimax_jax.checkpoint.names import STYLES, Range, StateTensor, Style, detect_style, state_tensors
from minimax_jax.checkpoint.read import read_state_tensor
from minimax_jax.checkpoint.verify import MXFP8_VALUES, compare
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.paths import model_directory

if TYPE_CHECKING:
    import jax

    from minimax_jax.parallel import Ranks
    from minimax_kernels import Mxfp8

QUANTIZATIONS = ("auto", "none")
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_MAX_THREADS = 8
_PROGRESS_DELAY = 2.0  # seconds; a load that is over sooner shows nothing


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """A checkpoint that was found to hold every tensor the configuration needs. A context manager.

    Attributes:
      files: the open files.
      style: the name style they are in.
      tensors: by state name.
      dtype: of the state, but for the router, which stays float32, and for `kept`.
      kept: names of the tensors that stay MXFP8.
    """

    files: CheckpointFiles
    style: Style
    tensors: dict[str, StateTensor]
    dtype: np.dtype
    kept: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.files.close()

    def dtype_of(self, name: str) -> np.dtype:
        """The dtype of one state tensor."""
        return _DTYPES["float32"] if self.tensors[name].float32 else self.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(map(self.num_bytes_of, self.tensors))

    def num_bytes_of(self, name: str) -> int:
        """Bytes of one state tensor, scales included."""
        tensor = self.tensors[name]
        if name in self.kept:
            return math.prod(tensor.shape) + math.prod(tensor.scales.shape)
        return math.prod(tensor.shape) * self.dtype_of(name).itemsize

    def read(self, name: str, ranges: tuple[Range, ...] | None = None, executor: Executor | None = None) -> np.ndarray:
        """One state tensor on the host, or the half-open `ranges` of it, one per axis; see `read_state_tensor`.

        MXFP8 weights are multiplied out.
        """
        return read_state_tensor(self.files, self.tensors[name], self.dtype_of(name), ranges, executor)

    def read_values(
        self, name: str, ranges: tuple[Range, ...] | None = None, executor: Executor | None = None
    ) -> np.ndarray:
        """The float8_e4m3fn values of a tensor of `kept`, [..., out, in], as `read`."""
        return read_state_tensor(self.files, self.tensors[name].values, _E4M3, ranges, executor)

    def read_scales(
        self, name: str, ranges: tuple[Range, ...] | None = None, executor: Executor | None = None
    ) -> np.ndarray:
        """Its uint8 scales, [..., out, in / 32], as `read`."""
        return read_state_tensor(self.files, self.tensors[name].scales, np.dtype(np.uint8), ranges, executor)


def plan_load(
    directory: str | Path, config: MiniMaxM3Config, dtype: Any = "bfloat16", *, quantization: str = "auto"
) -> LoadPlan:
    """Opens a checkpoint and verifies all of it from the headers, without reading weights or touching a device.

    Args:
      directory: with `*.safetensors`; "tiny" is the embedded checkpoint.
      config: the model to load.
      dtype: "bfloat16" or "float32", of the state.
      quantization: "auto" keeps MXFP8 weights in 8 bits, "none" multiplies them out. A state tensor that the file has
        only in part in MXFP8 is multiplied out.

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: for another dtype or quantization.
      CheckpointError: if a file is malformed or truncated, or a tensor is missing, extra, misshapen or of a
        wrong dtype (MXFP8 scales too); one error lists everything.
    """
    wanted = _state_dtype(dtype)
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization = {quantization!r}: must be {' or '.join(map(repr, QUANTIZATIONS))}")
    path = model_directory(directory)
    files = CheckpointFiles.open(path)
    try:
        style = detect_style(files.names())
        if style is None:
            bodies = ", ".join(repr(style.body) for style in STYLES.values())
            raise CheckpointError(path, f"no tensor name starts as MiniMax-M3's do (with {bodies})")
        tensors = state_tensors(config, style)
        problems = compare(files, config, style, tensors).all()
        if problems:
            raise CheckpointError(path, problems)
    except BaseException:
        files.close()
        raise
    kept = {
        name
        for name, tensor in tensors.items()
        if quantization == "auto" and all(files.dtype(piece.name) == MXFP8_VALUES for piece in tensor.pieces)
    }
    return LoadPlan(files, style, tensors, wanted, frozenset(kept))


def load_state(
    directory: str | Path,
    config: MiniMaxM3Config,
    dtype: Any = "bfloat16",
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
    ranks: Ranks | None = None,
    quantization: str = "auto",
    progress: bool = True,
) -> dict[str, jax.Array | Mxfp8]:
    """The text model's state, on a device, under the model's own names.

    Streams: beside what is already on the device, the host holds one state tensor and a few megabytes, and the device
    two copies of a tensor in 8 bits while its inputs are put in order. If it fails or is interrupted, what had been
    loaded is freed before the exception leaves.

    Args:
      directory, config, dtype: as for `plan_load`.
      device: where to, None for JAX's default device.
      ranks: instead of a device, what to spread the model over: each process then reads only what its devices need,
        one rank's part of a tensor at a time.
      quantization: as for `plan_load`; weights that stay in 8 bits come as `Mxfp8`.
      progress: a bar on stderr when loading takes more than two seconds.

    Raises:
      As `plan_load`, before any device memory is taken, and:
      ParallelError: if ranks would share a block of inputs with one scale.
    """
    with plan_load(directory, config, dtype, quantization=quantization) as plan:
        import jax
        from tqdm import tqdm

        if ranks is not None:
            ranks.layout.check_blocks({name: plan.tensors[name].shape for name in plan.kept})
        state: dict[str, jax.Array | Mxfp8] = {}
        threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="load")
        bar = tqdm(
            total=plan.num_bytes, desc="Loading weights", unit="B", unit_scale=True, file=sys.stderr,
            delay=_PROGRESS_DELAY, disable=not progress, leave=False,
        )  # fmt: skip
        try:
            for name in plan.tensors:
                state[name] = _on_device(plan, name, device, ranks, threads)
                bar.update(plan.num_bytes_of(name))
        except BaseException:
            # A traceback keeps this frame, and with it the arrays, alive for as long as anyone holds it.
            for array in jax.tree.leaves(state):
                array.delete()
            state.clear()
            raise
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            bar.close()
    return state


def _on_device(plan: LoadPlan, name: str, device: Any, ranks: Ranks | None, threads: Executor) -> jax.Array | Mxfp8:
    """One state tensor; the host's copy is gone when this returns."""
    import jax

    from minimax_jax.mxfp8_parts import for_kernels

    kept, tensor = name in plan.kept, plan.tensors[name]

    def placed(read: Callable[..., np.ndarray], shape: tuple[int, ...]) -> jax.Array:
        reading = functools.partial(read, name, executor=threads)
        if ranks is None:
            array = jax.device_put(reading(), device)
        else:
            array = ranks.assemble(name, shape, reading, columns_first=kept)
        return array.block_until_ready()

    if not kept:
        return placed(plan.read, tensor.shape)
    values = placed(plan.read_values, tensor.values.shape)
    try:
        return for_kernels(values, placed(plan.read_scales, tensor.scales.shape))
    finally:
        values.delete()  # as in `load_state`, whose `state` this is not part of


def _state_dtype(dtype: Any) -> np.dtype:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"dtype = {name!r}: must be {' or '.join(map(repr, _DTYPES))}")
    return _DTYPES[name]
