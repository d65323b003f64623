"""Turns what a caller hands over as input ids into checked prompts without padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts on the host.

    Attributes:
      tokens: one int32 array a prompt, padding removed.
      padded: [R, L] int32, the ids as they were given (lists are padded on the right with `pad`).
      kept: [R, L] bool, which of them are tokens.
    """

    tokens: list[np.ndarray]
    padded: np.ndarray
    kept: np.ndarray


def is_torch_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch"


def read_prompts(input_ids: Any, attention_mask: Any, *, vocab_size: int, max_len: int, pad: int = 0) -> Prompts:
    """Reads [R, L] or [L] ids (NumPy, JAX, torch) or lists of ids, with an optional mask of the same shape.

    Padding may stand on either side of a prompt: positions count from a prompt's first token.

    Raises:
      ValueError: for an empty prompt, ids outside the vocabulary, a prompt longer than `max_len`, ids that
        are not integers, a mask of another shape or with a hole in it.
    """
    ids = _as_rows(input_ids, pad)
    if isinstance(ids, tuple):  # lists of different lengths carry their own mask
        if attention_mask is not None:
            raise ValueError("attention_mask: must not be given with lists of different lengths")
        padded, kept = ids
    else:
        padded = ids
        kept = np.ones(padded.shape, bool) if attention_mask is None else _read_mask(attention_mask, padded.shape)
    for row, keep in enumerate(kept):
        count = int(keep.sum())
        if count == 0:
            raise ValueError(f"input_ids[{row}] is empty: a prompt needs at least one token")
        if int(np.abs(np.diff(keep.astype(np.int8))).sum()) > 1 + (not keep[0] and not keep[-1]):
            raise ValueError(f"attention_mask[{row}] has a hole: the tokens of a prompt must stand together")
        if count > max_len:
            raise ValueError(f"input_ids[{row}] has {count} tokens: at most max_position_embeddings = {max_len} fit")
    outside = kept & ((padded < 0) | (padded >= vocab_size))
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(f"input_ids[{row}][{column}] = {int(padded[row, column])}: must be within 0..{vocab_size - 1}")
    tokens = [ids[keep].astype(np.int32) for ids, keep in zip(padded, kept, strict=True)]
    return Prompts(tokens, np.where(kept, padded, pad).astype(np.int32), kept)


def _to_numpy(name: str, value: Any) -> np.ndarray:
    if is_torch_tensor(value):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.size == 0:
        array = array.astype(np.int64)
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(f"{name} is {array.dtype}: must be integers")
    return array


_LIST = (list, tuple)


def _pad_lists(lists: Any, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of different lengths as ([R, L] ids padded on the right, mask)."""
    padded = np.full((len(lists), max(map(len, lists))), pad, np.int64)
    kept = np.zeros(padded.shape, bool)
    for i, row in enumerate(lists):
        if len(row):
            padded[i, : len(row)] = _to_numpy(f"input_ids[{i}]", row)
            kept[i, : len(row)] = True
    return padded, kept


def _as_rows(input_ids: Any, pad: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    if isinstance(input_ids, (list, tuple)) and len({len(row) for row in input_ids if isinstance(row, _LIST)}) > 1:
        return _pad_lists(input_ids, pad)
    if isinstance(input_ids, (list, tuple)) and not input_ids:
        raise ValueError("input_ids is empty: give at least one prompt with at least one token")
    array = _to_numpy("input_ids", input_ids)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[0] == 0:
        raise ValueError(f"input_ids has shape {array.shape}: must be [R, L] or [L], with at least one row")
    return array


def _read_mask(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = _to_numpy("attention_mask", attention_mask)
    if mask.ndim == 1:
        mask = mask[None]
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {mask.shape}: must be {shape}, as input_ids")
    return mask != 0
