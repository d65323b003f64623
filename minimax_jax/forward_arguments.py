"""Arguments of a forward call, read and checked on the host."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from minimax_jax.cache import PastKeyValues
from minimax_jax.engine.prompts import Prompts, host_array
from minimax_jax.loss import IGNORED


def new_columns(attention_mask: Any, input_ids: Any, past: PastKeyValues | None) -> Any:
    """The mask of the new columns, of one that covers the context too, or them alone.

    Raises:
      ValueError: if it says of the context's columns what the calls before did not.
    """
    if past is None or attention_mask is None or past.get_seq_length() == 0:
        return attention_mask
    mask, seen = np.atleast_2d(host_array(attention_mask)), past.get_seq_length()
    if mask.shape[-1] != seen + _width(input_ids):
        return mask  # of the new columns alone, or wrong: the reader of the prompts says which
    if mask.shape[0] == past.batch_size and not np.array_equal(mask[:, :seen].astype(bool), past.kept):
        raise ValueError(f"attention_mask differs in its first {seen} columns from what past_key_values was made with")
    return mask[:, seen:]


def _width(input_ids: Any) -> int:
    if isinstance(input_ids, (list, tuple)):
        return max((_width(row) for row in input_ids if np.ndim(row)), default=len(input_ids))
    return int(np.shape(input_ids)[-1]) if np.ndim(input_ids) else 0


def read_positions(position_ids: Any, prompts: Prompts, most: int) -> list[Int[np.ndarray, "L"]] | None:
    """Positions of each prompt's tokens from [R, L], [1, L] or [L]; None stays None.

    Raises:
      ValueError: for another shape or type, or positions outside of 0..most - 1.
    """
    if position_ids is None:
        return None
    array = host_array(position_ids)
    shape = prompts.kept.shape
    if (
        array.ndim not in (1, 2)
        or array.shape[-1] != shape[1]
        or (array.ndim == 2 and array.shape[0] not in (1, shape[0]))
    ):
        raise ValueError(f"position_ids has shape {array.shape}: must be {shape}, as input_ids")
    if array.dtype.kind not in "iu":
        raise ValueError(f"position_ids is {array.dtype}: must be integers")
    array = np.broadcast_to(array, shape)
    outside = prompts.kept & ((array < 0) | (array >= most))
    if outside.any():
        raise ValueError(f"position_ids holds {int(array[outside][0])}: must be within 0..{most - 1}")
    return [row[kept].astype(np.int32) for row, kept in zip(array, prompts.kept, strict=True)]


def read_labels(labels: Any, kept: Bool[np.ndarray, "R L"], vocab_size: int) -> Int[np.ndarray, "R L"]:
    """Labels on the host; those of padding, and of tokens that follow padding, are made -100.

    Raises:
      ValueError: for another shape, other types than integers, or ids outside the vocabulary other than -100.
    """
    array = np.atleast_2d(host_array(labels))
    if array.shape != kept.shape:
        raise ValueError(f"labels has shape {array.shape}: must be {kept.shape}, as input_ids")
    if array.dtype.kind not in "iu":
        raise ValueError(f"labels is {array.dtype}: must be integers")
    outside = (array != IGNORED) & ((array < 0) | (array >= vocab_size))
    if outside.any():
        raise ValueError(f"labels holds {int(array[outside][0])}: must be within 0..{vocab_size - 1}, or {IGNORED}")
    counts = kept.copy()
    counts[:, 1:] &= kept[:, :-1]
    return np.where(counts, array, IGNORED).astype(np.int32)


def kept_columns(logits_to_keep: Any, length: int) -> Int[np.ndarray, "K"]:
    """The columns to give logits of: the last `logits_to_keep` (0 for all), or those that a 1-D array names.

    Raises:
      ValueError: for a negative number, columns that are not there, or another type.
    """
    if np.ndim(logits_to_keep) == 0:
        try:
            count = operator.index(logits_to_keep.item() if hasattr(logits_to_keep, "item") else logits_to_keep)
        except TypeError:
            count = -1
        if count < 0:
            raise ValueError(f"logits_to_keep = {logits_to_keep!r}: must be an integer >= 0, or columns")
        return np.arange(length)[-count:]
    columns = host_array(logits_to_keep)
    inside = columns.dtype.kind in "iu" and ((-length <= columns) & (columns < length)).all()
    if columns.ndim != 1 or not columns.size or not inside:
        raise ValueError(f"logits_to_keep = {columns.tolist()}: must be columns within {-length}..{length - 1}")
    return np.arange(length)[columns]


def wanted_tokens(
    kept: Bool[np.ndarray, "R L"], columns: Int[np.ndarray, "K"]
) -> tuple[list[Bool[np.ndarray, "L"]], Int[np.ndarray, "n"]]:
    """(which of each row's tokens stand in the columns, their order in the columns' own order).

    Of the tokens that are wanted, concatenated, row `order[i]` belongs to the i-th kept cell of [R, K].
    """
    chosen = np.zeros(kept.shape[1], bool)
    chosen[columns] = True
    rank = np.cumsum((kept & chosen).reshape(-1)).reshape(kept.shape) - 1
    return [chosen[row] for row in kept], rank[:, columns][kept[:, columns]]
