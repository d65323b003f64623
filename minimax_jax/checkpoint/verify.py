"""Compares a checkpoint's tensors with what a configuration needs, by their headers alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from minimax_jax.checkpoint.files import CheckpointFiles
from minimax_jax.checkpoint.mxfp8 import mxfp8_scale_shape
from minimax_jax.checkpoint.names import Piece, StateTensor, Style
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.tensor_table import MXFP8_BLOCK, SCALE_SUFFIX

FLOATS = ("BF16", "F16", "F32")
MXFP8_VALUES = "F8_E4M3"
MXFP8_SCALES = ("U8", "F8_E8M0")
_COMPARED_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Findings:
    """What does not fit, one line each; a line starts with the file tensor's name. Empty throughout: all fits."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    wrong_dtype: tuple[str, ...] = ()
    conflicting: tuple[str, ...] = ()

    def all(self) -> tuple[str, ...]:
        """Every line."""
        return (*self.missing, *self.misshapen, *self.wrong_dtype, *self.conflicting, *self.extra)


def compare(files: CheckpointFiles, config: MiniMaxM3Config, style: Style, tensors: dict[str, StateTensor]) -> Findings:
    """Every tensor that is missing, extra, of a wrong shape or of a wrong dtype; scales of MXFP8 weights included.

    Values are read in one case only: a configuration that ties the embeddings beside a file that holds `lm_head`
    all the same, which is accepted if the two are bit-equal.
    """
    missing: list[str] = []
    misshapen: list[str] = []
    wrong_dtype: list[str] = []
    conflicting: list[str] = []
    expected: set[str] = set()
    for tensor in tensors.values():
        for piece in tensor.pieces:
            expected.add(piece.name)
            if piece.name not in files:
                missing.append(f"{piece.name}: missing (shape {list(piece.shape)})")
                continue
            if files.shape(piece.name) != piece.shape:
                misshapen.append(_shape_line(files, piece.name, piece.shape))
            if piece.quantisable and files.dtype(piece.name) == MXFP8_VALUES:
                expected.add(piece.name + SCALE_SUFFIX)
                _compare_scale(files, piece, missing, misshapen, wrong_dtype)
            elif files.dtype(piece.name) not in FLOATS:
                allowed = (*FLOATS, MXFP8_VALUES) if piece.quantisable else FLOATS
                wrong_dtype.append(_dtype_line(files, piece.name, allowed))
    head = f"{style.head}lm_head.weight"
    if config.tie_word_embeddings and head in files:
        expected.add(head)
        embedding = f"{style.body}embed_tokens.weight"
        if embedding in files and not _same_bytes(files, head, embedding):
            conflicting.append(f"{head}: differs from {embedding}, but the configuration ties them")
    extra = [f"{name}: unexpected" for name in files.names() if name not in expected and not style.ignores(name)]
    return Findings(*map(tuple, (missing, extra, misshapen, wrong_dtype, conflicting)))


def _compare_scale(
    files: CheckpointFiles, piece: Piece, missing: list[str], misshapen: list[str], wrong_dtype: list[str]
) -> None:
    name, shape = piece.name + SCALE_SUFFIX, mxfp8_scale_shape(piece.shape)
    if shape is None:
        misshapen.append(f"{piece.name}: {piece.shape[-1]} inputs: MXFP8 needs a multiple of {MXFP8_BLOCK}")
    elif name not in files:
        missing.append(f"{name}: missing (shape {list(shape)}, the scales of an MXFP8 weight)")
    else:
        if files.shape(name) != shape:
            misshapen.append(_shape_line(files, name, shape))
        if files.dtype(name) not in MXFP8_SCALES:
            wrong_dtype.append(_dtype_line(files, name, MXFP8_SCALES))


def _shape_line(files: CheckpointFiles, name: str, shape: tuple[int, ...]) -> str:
    return f"{name}: shape {list(files.shape(name))}: must be {list(shape)}"


def _dtype_line(files: CheckpointFiles, name: str, allowed: tuple[str, ...]) -> str:
    return f"{name}: dtype {files.dtype(name)}: must be {' or '.join(allowed)}"


def _same_bytes(files: CheckpointFiles, one: str, other: str) -> bool:
    if (files.shape(one), files.dtype(one)) != (files.shape(other), files.dtype(other)):
        return False
    left, right = (files.read(name).reshape(-1).view(np.uint8) for name in (one, other))
    for start in range(0, left.size, _COMPARED_BYTES):
        if not np.array_equal(left[start : start + _COMPARED_BYTES], right[start : start + _COMPARED_BYTES]):
            return False
        files.release(one)
        files.release(other)
    return True
