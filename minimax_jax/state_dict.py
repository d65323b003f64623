"""A model's weights under the names and in the shapes of torch's state_dict, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from minimax_jax.checkpoint import STYLES, dequantize_mxfp8, quantize_mxfp8, state_tensors
from minimax_jax.checkpoint.names import Piece, StateTensor, Style, detect_style
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.mxfp8_parts import marked_scales, values_in_rows
from minimax_kernels import Mxfp8

BUFFERS = ("e_score_correction_bias",)  # what is no parameter in transformers


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` did not find, and what it did not know."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def named_tensors(state: Mapping[str, Any], config: MiniMaxM3Config, style: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) in a style's order, linears [out, in]; each is made when it is asked for.

    Of an MXFP8 weight the values and then the scales, [out, in / 32].

    Args:
      state: weights by the model's own names, JAX or NumPy, or `Mxfp8` of these.
      style: "transformers" or "vendor".

    Raises:
      ValueError: for another style.
    """
    for tensor in state_tensors(config, _style(style)).values():
        whole = state[tensor.name]
        values = values_in_rows(whole) if isinstance(whole, Mxfp8) else None
        for piece in tensor.pieces:
            if isinstance(whole, Mxfp8):
                yield piece.name, _cut(values, piece.values)
                yield piece.scales.name, _cut(whole.scales, piece.scales)
            else:
                yield piece.name, _cut(whole, piece)
    if config.tie_word_embeddings and style == "transformers":
        yield "lm_head.weight", state["embed_tokens"]


def state_from(
    given: Mapping[str, Any], state: Mapping[str, Any], config: MiniMaxM3Config, *, strict: bool
) -> tuple[dict[str, Any], IncompatibleKeys]:
    """New values on the host for the state tensors that `given` has, whole or in part; `state` fills the rest.

    They come in the form that `state` has them in, arrays or `Mxfp8`.

    Args:
      given: torch, NumPy or JAX tensors by name, in either style; they are copied. float8_e4m3fn ones need their scales
        beside them.
      strict: whether a name too few or too many is an error.

    Raises:
      RuntimeError: as torch does, for names that do not fit (if strict), and for wrong shapes; nothing has changed.
      ValueError: if no name is one of a MiniMax-M3.
    """
    style = detect_style(given)
    if style is None:
        bodies = ", ".join(repr(style.body) for style in STYLES.values())
        raise ValueError(f"state_dict has no name that starts as MiniMax-M3's do (with {bodies})")
    tensors = state_tensors(config, style)
    known = {piece.name: piece for tensor in tensors.values() for piece in tensor.pieces}
    scales = {name: piece.scales for name, piece in known.items() if name in given and _is_e4m3(given[name])}
    known |= {piece.name: piece for piece in scales.values()}
    tied = {f"{style.head}lm_head.weight"} if config.tie_word_embeddings else set()
    missing = [name for name in known if name not in given]
    unexpected = [name for name in given if name not in known and name not in tied and not style.ignores(name)]
    problems = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
    problems = problems if strict else []
    if not strict:  # values are worth nothing without their scales
        problems = [f"missing: {piece.name}" for piece in scales.values() if piece.name not in given]
    for name, piece in known.items():
        if name in given and tuple(given[name].shape) != piece.shape:
            problems.append(f"{name}: shape {list(given[name].shape)}: must be {list(piece.shape)}")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... {len(problems) - 20} more" if len(problems) > 20 else "")
        raise RuntimeError(f"state_dict does not fit the model:\n  {shown}")
    changed = (tensor for tensor in tensors.values() if any(piece.name in given for piece in tensor.pieces))
    return {tensor.name: _assembled(tensor, given, state) for tensor in changed}, IncompatibleKeys(missing, unexpected)


def _assembled(tensor: StateTensor, given: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    whole = jax.tree.map(np.array, state[tensor.name])
    if isinstance(whole, Mxfp8):
        whole = Mxfp8(values_in_rows(whole), whole.scales)
    for piece in tensor.pieces:
        if piece.name not in given:
            continue
        part, scales = _host(given[piece.name]), None
        if _is_e4m3(given[piece.name]):
            scales = _host(given[piece.scales.name])
        if isinstance(whole, Mxfp8):
            values, scales = quantize_mxfp8(part) if scales is None else (part, scales)
            _cut(whole.values, piece.values)[:] = values
            _cut(whole.scales, piece.scales)[:] = scales
        else:
            _cut(whole, piece)[:] = part if scales is None else dequantize_mxfp8(part, scales)
    if isinstance(whole, Mxfp8):
        return Mxfp8.from_rows(whole.values, marked_scales(whole.values.view(np.uint8), whole.scales))
    return whole


def _cut(whole: Any, piece: Piece) -> Any:
    """A piece as files have it, of NumPy arrays a view."""
    part = whole[piece.state_index]
    return part.swapaxes(-1, -2) if piece.transposed else part


def _is_e4m3(tensor: Any) -> bool:
    return str(tensor.dtype).removeprefix("torch.") == "float8_e4m3fn"


def _host(tensor: Any) -> np.ndarray:
    """Any library's tensor on the host; torch's bfloat16, which NumPy does not know, as float32."""
    if hasattr(tensor, "detach"):
        exact, tensor = _is_e4m3(tensor), tensor.detach().cpu()
        tensor = (tensor.float() if exact or str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
        return tensor.astype(ml_dtypes.float8_e4m3fn) if exact else tensor
    return np.asarray(tensor)


def _style(style: str) -> Style:
    if style not in ("transformers", "vendor"):
        raise ValueError(f"style = {style!r}: must be 'transformers' or 'vendor'")
    return STYLES[style]
