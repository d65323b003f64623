"""Turns what a caller hands over as input ids into checked prompts without padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts on the host.

    Attributes:
      tokens: one int32 array a prompt, padding removed.
      padded: [R, L] int32, the ids as they were given (lists of different lengths are padded on the right).
      kept: [R, L] bool, which of them are tokens.
    """

    tokens: list[np.ndarray]
    padded: np.ndarray
    kept: np.ndarray


def is_torch_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch"


def read_prompts(
    input_ids: Any, attention_mask: Any, *, vocab_size: int, max_len: int, pad: int = 0, least: int = 1
) -> Prompts:
    """Reads [R, L] or [L] ids (NumPy, JAX, torch, lists), or a list of prompts of different lengths.

    Padding may stand on either side of a prompt: positions count from a prompt's first token.

    Args:
      attention_mask: of the ids' shape, 0 on padding; not with prompts of different lengths.
      pad: what fills prompts of different lengths up.
      least: tokens that each prompt must have.

    Raises:
      ValueError: for an empty prompt, ids outside the vocabulary, a prompt longer than `max_len`, ids that
        are not integers, a mask of another shape or with a hole in it.
    """
    padded, kept = _read_ids(input_ids, pad)
    if attention_mask is not None:
        if not kept.all():
            raise ValueError("attention_mask: must not be given with prompts of different lengths")
        kept = _read_mask(attention_mask, padded.shape)
    for row, keep in enumerate(kept):
        count = int(keep.sum())
        if count < least:
            raise ValueError(f"input_ids[{row}] is empty: a prompt needs at least one token")
        if count and np.flatnonzero(keep)[-1] - np.flatnonzero(keep)[0] + 1 != count:
            raise ValueError(f"attention_mask[{row}] has a hole: the tokens of a prompt must stand together")
        if count > max_len:
            raise ValueError(f"input_ids[{row}] has {count} tokens: at most max_position_embeddings = {max_len} fit")
    outside = kept & ((padded < 0) | (padded >= vocab_size))
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(f"input_ids[{row}][{column}] = {int(padded[row, column])}: must be within 0..{vocab_size - 1}")
    tokens = [ids[keep].astype(np.int32) for ids, keep in zip(padded, kept, strict=True)]
    int32 = np.iinfo(np.int32)
    return Prompts(tokens, np.clip(padded, int32.min, int32.max).astype(np.int32), kept)


def document_ids(tokenizer: Tokenizer, text: str, config: MiniMaxM3Config) -> list[int]:
    """The text's ids with the document-start token in front, if the tokenizer has one and it is not there yet."""
    ids = tokenizer.encode(text)
    start = config.bos_token_id if config.bos_token_id is not None else tokenizer.bos_token_id
    if start is None or not tokenizer.token_bytes(start, skip_special_tokens=False) or ids[:1] == [start]:
        return ids
    return [start, *ids]


def host_array(value: Any) -> np.ndarray:
    """Anything that NumPy reads, and torch tensors of any device."""
    return np.asarray(value.detach().cpu().numpy() if is_torch_tensor(value) else value)


def _to_numpy(name: str, value: Any) -> np.ndarray:
    try:
        array = host_array(value)
    except ValueError:  # NumPy on nested lists of different lengths
        raise ValueError(f"{name}: must be integers in rows, one level of nesting") from None
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array
    raise ValueError(f"{name} is {array.dtype}: must be integers")


def _read_ids(input_ids: Any, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """([R, L] ids, [R, L] which of them were given)."""
    if isinstance(input_ids, (list, tuple)):
        if not input_ids:
            raise ValueError("input_ids is empty: give at least one prompt with at least one token")
        nested = [isinstance(row, (list, tuple)) or getattr(row, "ndim", 0) > 0 for row in input_ids]
        if any(nested) and not all(nested):
            raise ValueError("input_ids mixes ids and prompts: must be a list of ids or a list of prompts")
        if nested[0]:
            return _pad_rows([_to_numpy(f"input_ids[{i}]", row) for i, row in enumerate(input_ids)], pad)
    array = _to_numpy("input_ids", input_ids)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[0] == 0:
        raise ValueError(f"input_ids has shape {array.shape}: must be [R, L] or [L], with at least one row")
    return array, np.ones(array.shape, bool)


def _pad_rows(rows: list[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    for i, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(f"input_ids[{i}] has shape {row.shape}: must be one prompt, [L]")
    padded = np.full((len(rows), max(map(len, rows))), pad, np.int64)
    kept = np.zeros(padded.shape, bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)], kept[i, : len(row)] = row, True
    return padded, kept


def _read_mask(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = host_array(attention_mask)
    if mask.ndim == 1:
        mask = mask[None]
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {mask.shape}: must be {shape}, as input_ids")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("attention_mask holds other values than 0 and 1: must be 1 on tokens and 0 on padding")
    return mask.astype(bool)
