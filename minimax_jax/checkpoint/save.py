"""Writes a state as a Hugging Face checkpoint: config.json and safetensors, whole or not at all."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from minimax_jax.checkpoint.errors import CheckpointError
from minimax_jax.checkpoint.files import INDEX_NAME, SINGLE_NAME
from minimax_jax.checkpoint.mxfp8 import dequantize_mxfp8
from minimax_jax.checkpoint.names import STYLES, Piece, StateTensor, state_tensors
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.presets import mxfp8_quantization

if TYPE_CHECKING:
    import jax

    from minimax_kernels import Mxfp8

Key = TypeVar("Key")
_METADATA = {"format": "pt"}  # transformers refuses a file that does not say so
_WRITABLE = ("bfloat16", "float32")


def save_state(
    state: Mapping[str, jax.Array | np.ndarray | Mxfp8],
    config: MiniMaxM3Config,
    directory: str | Path,
    *,
    style: str = "transformers",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes `config.json` and `model.safetensors`, or shards with their index, into `directory`.

    "transformers" is what `MiniMaxM3VLForCausalLM.from_pretrained` loads; "vendor" has the names of the released
    checkpoints, text model only. Tensors keep the state's dtypes (the router float32); MXFP8 weights stay in 8 bits in
    the vendor's style, beside their scales, and are multiplied out in transformers', which has none.

    All is written under a temporary name first: a new directory appears in one rename; in an existing one the old
    weights go before the first new file comes, and the index last, so that old and new never mix. Other files there (a
    tokenizer) stay. The host holds one shard and one state tensor at a time.

    Args:
      state: the model's tensors by name, bfloat16 or float32, or `Mxfp8`.
      config: the model's; its vision part is left out, and its quantisation is that of the state.
      directory: made if it does not exist.
      style: "transformers" or "vendor".
      max_shard_bytes: data bytes of a file before the next begins; one tensor may be larger.

    Raises:
      ValueError: for another style, or a limit that is not positive.
      CheckpointError: if the state lacks tensors of the model, has others, or wrong shapes or dtypes.
    """
    if style not in ("transformers", "vendor"):
        raise ValueError(f"style = {style!r}: must be 'transformers' or 'vendor'")
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes!r}: must be > 0")
    target = Path(directory).expanduser().resolve()
    tensors = state_tensors(config, STYLES[style])
    problems = _state_problems(state, tensors)
    if problems:
        raise CheckpointError(f"state for {target}", problems)
    target.parent.mkdir(parents=True, exist_ok=True)
    home = target if target.is_dir() else target.parent  # renames must stay within one file system
    stage = home / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    stage.mkdir()
    try:
        embedding: Any = state["embed_tokens"]
        dtype, kept = np.dtype(embedding.dtype), _kept(state) if style == "vendor" else []
        write_config(_saved_config(config, tensors, kept), style, dtype.name, stage / "config.json")
        _write_weights(state, tensors, kept, dtype, stage, max_shard_bytes)
        _publish(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _state_problems(state: Mapping[str, Any], tensors: dict[str, StateTensor]) -> list[str]:
    problems = [f"{name}: missing (shape {list(t.shape)})" for name, t in tensors.items() if name not in state]
    for name, array in state.items():
        if name not in tensors:
            problems.append(f"{name}: unexpected")
            continue
        allowed = ("float32",) if tensors[name].float32 else _WRITABLE
        if tuple(array.shape) != tensors[name].shape:
            problems.append(f"{name}: shape {list(array.shape)}: must be {list(tensors[name].shape)}")
        if _is_mxfp8(array):
            scales = tensors[name].scales.shape if len(array.shape) > 1 else None
            if tuple(array.scales.shape) != scales:
                problems.append(f"{name}: scales of shape {list(array.scales.shape)}: must be {scales}")
        elif np.dtype(array.dtype).name not in allowed:
            problems.append(f"{name}: dtype {np.dtype(array.dtype).name}: must be {' or '.join(allowed)}")
    return problems


def _is_mxfp8(leaf: Any) -> bool:
    from minimax_kernels import Mxfp8

    return isinstance(leaf, Mxfp8)


def _kept(state: Mapping[str, Any]) -> list[str]:
    """Names of the state tensors that are in 8 bits."""
    return [name for name, leaf in state.items() if _is_mxfp8(leaf)]


def _saved_config(config: MiniMaxM3Config, tensors: dict[str, StateTensor], kept: list[str]) -> MiniMaxM3Config:
    """For a state of which `kept` is in 8 bits: matrices in floats that usually are not are named, one by one."""
    quantization = None
    if kept:
        floats = (tensor for name, tensor in tensors.items() if name not in kept)
        also = [piece.name.removesuffix(".weight") for tensor in floats for piece in tensor.pieces if piece.quantisable]
        quantization = mxfp8_quantization((i for i in range(config.num_hidden_layers) if config.is_moe(i)), also)
    return config.replace(quantization=quantization, vision=None)


def write_config(config: MiniMaxM3Config, style: str, dtype: str, path: Path) -> None:
    """config.json in a style, for matrices of `dtype`."""
    content = config.to_dict(style)
    for level in (content, content.get("text_config", {})):  # what the original said of its own dtype
        level.pop("dtype", None)
        level.pop("torch_dtype", None)
    # Without it transformers would load in the dtype of whichever tensor it meets first.
    content["dtype" if style == "transformers" else "torch_dtype"] = dtype
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
        _sync(file.fileno())


def _write_weights(
    state: Mapping[str, Any],
    tensors: dict[str, StateTensor],
    kept: list[str],
    dtype: np.dtype,
    stage: Path,
    max_shard_bytes: float,
) -> None:
    sizes = _file_sizes(state, tensors, kept, dtype)
    shards = assign_shards(sizes, max_shard_bytes)
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    arrays = _file_tensors(state, tensors, kept, dtype)
    for number, names in enumerate(shards, 1):
        shard = SINGLE_NAME if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(dict(itertools.islice(arrays, len(names))), stage / shard)
        weight_map.update(dict.fromkeys(names, shard))
    if not single:
        write_index(weight_map, sum(sizes.values()), stage / INDEX_NAME)


def write_index(weight_map: Mapping[str, str], total_size: int, path: Path) -> None:
    """The index of shards: which file holds each tensor, and the bytes of all."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"metadata": {"total_size": total_size}, "weight_map": weight_map}, file, indent=2, sort_keys=True)
        file.write("\n")
        _sync(file.fileno())


def assign_shards(sizes: Mapping[Key, int], max_shard_bytes: float) -> list[list[Key]]:
    """The keys by shard, in their order; `sizes` are in bytes."""
    shards: list[list[Key]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _file_sizes(
    state: Mapping[str, Any], tensors: dict[str, StateTensor], kept: list[str], dtype: np.dtype
) -> dict[str, int]:
    """Bytes of every tensor of the files, in the order in which `_file_tensors` makes them."""
    sizes = {}
    for tensor in tensors.values():
        leaf = state[tensor.name]
        itemsize = dtype.itemsize if _is_mxfp8(leaf) else np.dtype(leaf.dtype).itemsize
        for piece in tensor.pieces:
            if tensor.name in kept:
                sizes[piece.name], sizes[piece.scales.name] = math.prod(piece.shape), math.prod(piece.scales.shape)
            else:
                sizes[piece.name] = math.prod(piece.shape) * itemsize
    return sizes


def _file_tensors(
    state: Mapping[str, Any], tensors: dict[str, StateTensor], kept: list[str], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) as files have them; MXFP8 ones that are not `kept` are multiplied out to `dtype`."""
    from minimax_jax.mxfp8_parts import values_in_rows

    for tensor in tensors.values():
        leaf = state[tensor.name]
        if not _is_mxfp8(leaf):
            whole = _to_host(leaf)
            for piece in tensor.pieces:
                yield piece.name, _cut(whole, piece)
            continue
        values, scales = _to_host(values_in_rows(leaf)), _to_host(leaf.scales)
        for piece in tensor.pieces:
            parts = _cut(values, piece.values), _cut(scales, piece.scales)
            if tensor.name in kept:
                yield piece.name, parts[0]
                yield piece.scales.name, parts[1]
            else:
                yield piece.name, _multiplied_out(*parts, dtype)


def _multiplied_out(values: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`dequantize_mxfp8` of a matrix or, one after the other, of stacked ones: float32 is four times their size."""
    if values.ndim == 2:
        return dequantize_mxfp8(values, scales).astype(dtype)
    return np.stack([_multiplied_out(*pair, dtype) for pair in zip(values, scales, strict=True)])


def _cut(whole: np.ndarray, piece: Piece) -> np.ndarray:
    """The piece as stored; contiguous, because safetensors writes an array's memory whatever its strides."""
    part = whole[piece.state_index]
    return np.ascontiguousarray(np.swapaxes(part, -1, -2) if piece.transposed else part)


def _to_host(array: Any) -> np.ndarray:
    """A possibly sharded array in NumPy, without a copy that stays cached on it.

    `np.asarray(array)` would: after saving, the host would hold the whole model.
    """
    import jax

    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if not array.is_fully_addressable:
        raise ValueError(f"an array over devices of other processes ({array.sharding}) cannot be saved from here")

    def host_copy(shard: jax.Shard) -> np.ndarray:
        where = jax.sharding.SingleDeviceSharding(shard.device)
        return np.asarray(jax.make_array_from_single_device_arrays(shard.data.shape, where, [shard.data]))

    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if len(shards) == 1:
        return host_copy(shards[0])
    out = np.empty(array.shape, array.dtype)
    for shard in shards:
        out[shard.index] = host_copy(shard)
    return out


def write_shard(arrays: dict[str, np.ndarray], path: Path) -> None:
    """One file, on the disk when this returns; beside it lies config.json, whose permissions it gets."""
    from safetensors.numpy import save_file

    save_file(arrays, path, metadata=_METADATA)
    shutil.copymode(path.parent / "config.json", path)  # the library makes files that only their owner can read
    with open(path, "rb") as file:
        _sync(file.fileno())


def _publish(stage: Path, target: Path) -> None:
    """Moves what was staged under its final names."""
    if not target.exists():
        os.rename(stage, target)
        return
    old = [target / INDEX_NAME, target / SINGLE_NAME, *sorted(target.glob("model-*-of-*.safetensors"))]
    for path in old:
        path.unlink(missing_ok=True)
    # config.json first, the index last: whatever is missing in between is missed by every loader.
    for path in sorted(stage.iterdir(), key=lambda p: (p.name == INDEX_NAME, p.name != "config.json", p.name)):
        os.replace(path, target / path.name)


def _sync(descriptor: int) -> None:
    """Renames must not reach the disk before the bytes do."""
    os.fsync(descriptor)
