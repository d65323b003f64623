"""Writes a state as a Hugging Face checkpoint: config.json and safetensors, whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimax_jax.checkpoint.errors import CheckpointError
from minimax_jax.checkpoint.files import INDEX_NAME, SINGLE_NAME
from minimax_jax.checkpoint.names import STYLES, Piece, StateTensor, state_tensors
from minimax_jax.config import MiniMaxM3Config

if TYPE_CHECKING:
    import jax

_METADATA = {"format": "pt"}  # transformers refuses a file that does not say so
_WRITABLE = ("bfloat16", "float32")


def save_state(
    state: Mapping[str, jax.Array | np.ndarray],
    config: MiniMaxM3Config,
    directory: str | Path,
    *,
    style: str = "transformers",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes `config.json` and `model.safetensors`, or shards with their index, into `directory`.

    "transformers" is what `MiniMaxM3VLForCausalLM.from_pretrained` loads; "vendor" has the names of the released
    checkpoints, text model only. Tensors keep the state's dtypes (the router float32). All is written under a
    temporary name first: a new directory appears in one rename; in an existing one the old
    weights go before the first new file comes, and the index last, so that old and new never mix. Other files
    there (a tokenizer) stay. The host holds one shard and one state tensor at a time.

    Args:
      state: the model's tensors by name, bfloat16 or float32.
      config: the model's; its quantisation and its vision part are left out, as neither is in a state.
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
        _write_config(config, style, str(np.dtype(state["embed_tokens"].dtype)), stage / "config.json")
        _write_weights(state, tensors, stage, max_shard_bytes)
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
        if np.dtype(array.dtype).name not in allowed:
            problems.append(f"{name}: dtype {np.dtype(array.dtype).name}: must be {' or '.join(allowed)}")
    return problems


def _write_config(config: MiniMaxM3Config, style: str, dtype: str, path: Path) -> None:
    content = config.replace(quantization=None, vision=None).to_dict(style)
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
    state: Mapping[str, Any], tensors: dict[str, StateTensor], stage: Path, max_shard_bytes: float
) -> None:
    shards = _assign_shards(state, tensors, max_shard_bytes)
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    arrays = _file_tensors(state, tensors)
    for number, names in enumerate(shards, 1):
        shard = SINGLE_NAME if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(dict(itertools.islice(arrays, len(names))), stage / shard)
        weight_map.update(dict.fromkeys(names, shard))
    if not single:
        total = sum(int(array.size) * np.dtype(array.dtype).itemsize for array in state.values())
        with open(stage / INDEX_NAME, "w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2, sort_keys=True)
            file.write("\n")
            _sync(file.fileno())


def _assign_shards(
    state: Mapping[str, Any], tensors: dict[str, StateTensor], max_shard_bytes: float
) -> list[list[str]]:
    """File tensor names by shard, in the order in which `_file_tensors` makes them."""
    shards: list[list[str]] = [[]]
    filled = 0
    for tensor in tensors.values():
        itemsize = np.dtype(state[tensor.name].dtype).itemsize
        for piece in tensor.pieces:
            size = int(np.prod(piece.shape)) * itemsize
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(piece.name)
            filled += size
    return shards


def _file_tensors(state: Mapping[str, Any], tensors: dict[str, StateTensor]) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in tensors.values():
        whole = _to_host(state[tensor.name])
        for piece in tensor.pieces:
            yield piece.name, _cut(whole, piece)


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


def _write_shard(arrays: dict[str, np.ndarray], path: Path) -> None:
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
