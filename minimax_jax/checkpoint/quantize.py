"""Makes an MXFP8 checkpoint in the vendor's layout from one in floats, a shard at a time."""

from __future__ import annotations

import dataclasses
import fcntl
import glob
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np

from minimax_jax.checkpoint.errors import CheckpointError
from minimax_jax.checkpoint.files import INDEX_NAME, SINGLE_NAME
from minimax_jax.checkpoint.load import LoadPlan, plan_load
from minimax_jax.checkpoint.mxfp8 import mxfp8_scale_shape, quantize_mxfp8
from minimax_jax.checkpoint.names import STYLES, Piece, is_draft, state_tensors
from minimax_jax.checkpoint.read import read_state_tensor
from minimax_jax.checkpoint.save import assign_shards, write_config, write_index, write_shard
from minimax_jax.checkpoint.verify import MXFP8_VALUES
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.paths import model_directory
from minimax_jax.presets import mxfp8_quantization
from minimax_jax.tensor_table import MXFP8_BLOCK

_STRIP_ELEMENTS = 1 << 22  # quantised at a time: temporaries take twelve times their bytes in the file
_MAX_THREADS = 8
_PROGRESS_DELAY = 2.0  # seconds; what is over sooner shows nothing
_OTHER_FILES = (".json", ".jinja", ".txt", ".model", ".py", ".md")  # of a checkpoint's folder, taken along
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")  # such files have no suffix, or any


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What was written.

    Attributes:
      directory: where.
      tensors: that were quantised; bytes_before, bytes_after: of all weights, as stored.
    """

    directory: Path
    tensors: int
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class _Job:
    """One tensor of the source: what it becomes, by name in bytes, and how it is made."""

    sizes: dict[str, int]
    read_bytes: int
    make: Callable[[], dict[str, np.ndarray]]


def quantize_checkpoint(
    directory: str | Path, out: str | Path, *, max_shard_bytes: float = 5e9, progress: bool = True
) -> Quantized:
    """Writes what `directory` holds as an MXFP8 checkpoint with the vendor's names, config and index.

    Linears and routed experts become e4m3 values with a scale per 32 inputs, rounded once (`quantize_mxfp8`); all else
    stays: embeddings, head and norms in bfloat16, routers in float32, vision and MTP tensors as they are, MTP named in
    `ignored_layers`. Tokenizer, licence and README come along. The same input gives the same bytes. `out` appears in
    one rename when it is whole, and what a killed run to the same `out` has left behind is removed; the host holds one
    shard.

    Args:
      directory: a checkpoint in floats, of the vendor's or transformers' names; "tiny" is the embedded one.
      out: a directory that does not exist, or is empty.
      max_shard_bytes: of a file before the next begins.
      progress: a bar on stderr when it takes more than two seconds.

    Raises:
      FileNotFoundError: if there is no such directory.
      ConfigError, CheckpointError: if it cannot be loaded, or its inputs cannot be cut into blocks of 32.
      ValueError: if it is quantised already, or `out` has files; OSError: if the disk has no room.
    """
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes!r}: must be > 0")
    source, target = model_directory(directory), Path(out).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"OUT = {out}: must be a new or an empty directory")
    config = MiniMaxM3Config.from_pretrained(source)
    if config.quantization is not None:
        method = config.quantization.get("quant_method")
        raise ValueError(f"DIR = {directory}: is quantised already ({method}): must be a checkpoint in floats")
    with plan_load(source, config, "bfloat16", quantization="none") as plan:
        jobs = [*_text_jobs(plan, config), *_other_jobs(plan)]
        target.parent.mkdir(parents=True, exist_ok=True)
        total = sum(sum(job.sizes.values()) for job in jobs)
        _remove_stale(target)
        _require_room(target.parent, total)
        with _staged(target) as stage:
            moe = [i for i in range(config.num_hidden_layers) if config.is_moe(i)]
            drafts = ["mtp"] if any(map(is_draft, plan.files.names())) else []
            whole = config.replace(quantization=mxfp8_quantization(moe, drafts))
            write_config(whole, "vendor", "bfloat16", stage / "config.json")
            _write(jobs, stage, max_shard_bytes, progress=progress)
            _copy_others(source, stage)
            os.rename(stage, target)
    tensors = sum(len(job.sizes) == 2 for job in jobs)
    return Quantized(target, tensors, sum(job.read_bytes for job in jobs), total)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write to, locked for as long as this process lives and gone afterwards."""
    stage = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    stage.mkdir()
    try:
        with ExitStack() as held:
            with suppress(OSError):  # a file system without locks: there nobody removes what seems to be stale either
                held.enter_context(_lock(stage))
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Removes the folders of runs to `target` that were killed: nobody holds their locks."""
    for stage in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        with suppress(OSError), _lock(stage):
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Raises OSError if another process has it."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _text_jobs(plan: LoadPlan, config: MiniMaxM3Config) -> Iterator[_Job]:
    """The text model's tensors, in the order of the vendor's files."""
    _require_floats(plan)
    for tensor in state_tensors(config, STYLES["vendor"]).values():
        dtype = plan.dtype_of(tensor.name)
        stored = sum(plan.files.num_bytes(piece.name) for piece in plan.tensors[tensor.name].pieces)
        for piece in tensor.pieces:
            size = math.prod(piece.shape)
            sizes = {piece.name: size * dtype.itemsize}
            if piece.quantisable:
                sizes = {piece.name: size, piece.scales.name: size // MXFP8_BLOCK}
            yield _Job(sizes, stored * size // math.prod(tensor.shape), _maker(plan, tensor.name, piece))


def _maker(plan: LoadPlan, name: str, piece: Piece) -> Callable[[], dict[str, np.ndarray]]:
    def make() -> dict[str, np.ndarray]:
        # float32 holds every float of a file, so that a quantised number is rounded once
        dtype = np.dtype(np.float32) if piece.quantisable else plan.dtype_of(name)
        part = read_state_tensor(plan.files, plan.tensors[name], dtype, piece.region)
        part = part.reshape([high - low for low, high in piece.region][-len(piece.shape) :])
        stored = part.swapaxes(-1, -2) if piece.transposed else part
        if not piece.quantisable:
            return {piece.name: np.ascontiguousarray(stored)}
        values, scales = _quantized(stored)
        return {piece.name: values, piece.scales.name: scales}

    return make


def _quantized(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`quantize_mxfp8`, some rows at a time."""
    rows, inputs = matrix.shape
    values = np.empty(matrix.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty((rows, inputs // MXFP8_BLOCK), np.uint8)
    step = max(1, _STRIP_ELEMENTS // inputs)
    for row in range(0, rows, step):
        values[row : row + step], scales[row : row + step] = quantize_mxfp8(matrix[row : row + step])
    return values, scales


def _require_floats(plan: LoadPlan) -> None:
    """Nothing may be quantised yet, and everything must fit blocks of 32."""
    problems = []
    for tensor in plan.tensors.values():
        for piece in tensor.pieces:
            if plan.files.dtype(piece.name) == MXFP8_VALUES:
                problems.append(f"{piece.name}: is MXFP8 already: must be in floats")
            elif piece.quantisable and mxfp8_scale_shape(piece.shape) is None:
                problems.append(f"{piece.name}: {piece.shape[-1]} inputs: MXFP8 needs a multiple of {MXFP8_BLOCK}")
    if problems:
        raise CheckpointError(plan.files.directory, problems)


def _other_jobs(plan: LoadPlan) -> Iterator[_Job]:
    """Tensors outside the text model, byte for byte."""
    names = sorted(name for name in plan.files.names() if plan.style.ignores(name))
    if names and plan.style.name != "vendor":
        raise CheckpointError(
            plan.files.directory,
            f"{names[0]}: a tensor outside the text model must have the vendor's name; transformers' save_pretrained "
            "of the whole model writes those",
        )
    for name in names:

        def make(name: str = name) -> dict[str, np.ndarray]:
            copy = np.array(plan.files.read(name))
            plan.files.release(name)
            return {name: copy}

        size = plan.files.num_bytes(name)
        yield _Job({name: size}, size, make)


def _require_room(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise OSError(f"{directory}: the disk has {free / 1e9:.1f} GB free: must be at least {num_bytes / 1e9:.1f} GB")


def _write(jobs: Sequence[_Job], stage: Path, max_shard_bytes: float, *, progress: bool) -> None:
    from tqdm import tqdm

    shards = assign_shards({number: sum(job.sizes.values()) for number, job in enumerate(jobs)}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="quantize")
    bar = tqdm(
        total=sum(job.read_bytes for job in jobs), desc="Quantising", unit="B", unit_scale=True, file=sys.stderr,
        delay=_PROGRESS_DELAY, disable=not progress, leave=False,
    )  # fmt: skip
    try:
        for number, members in enumerate(shards, 1):
            shard = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays: dict[str, np.ndarray] = {}
            own = [jobs[member] for member in members]
            for job, made in zip(own, threads.map(lambda job: job.make(), own), strict=True):
                arrays |= made
                bar.update(job.read_bytes)
            write_shard(arrays, stage / shard)
            weight_map |= dict.fromkeys(arrays, shard)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        bar.close()
    if len(shards) > 1:
        write_index(weight_map, sum(sum(job.sizes.values()) for job in jobs), stage / INDEX_NAME)


def _copy_others(source: Path, stage: Path) -> None:
    """Tokenizer, template, licence and the like; weights and what was written anew stay behind."""
    for path in sorted(source.iterdir()):
        known = path.suffix in _OTHER_FILES or path.name.upper().startswith(_LICENCES)
        known = known and path.name not in ("config.json", INDEX_NAME)
        if known and path.is_file():
            shutil.copyfile(path, stage / path.name)
