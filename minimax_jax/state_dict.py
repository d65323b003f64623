"""A model's weights under the names and in the shapes of torch's state_dict, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minimax_jax.checkpoint import STYLES, state_tensors
from minimax_jax.checkpoint.names import StateTensor, Style, detect_style
from minimax_jax.config import MiniMaxM3Config

BUFFERS = ("e_score_correction_bias",)  # what is no parameter in transformers


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` did not find, and what it did not know."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def named_tensors(state: Mapping[str, Any], config: MiniMaxM3Config, style: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) in a style's order, linears [out, in]; each is made when it is asked for.

    Args:
      state: weights by the model's own names, JAX or NumPy.
      style: "transformers" or "vendor".

    Raises:
      ValueError: for another style.
    """
    for tensor in state_tensors(config, _style(style)).values():
        whole = state[tensor.name]
        for piece in tensor.pieces:
            part = whole[piece.state_index]
            yield piece.name, part.swapaxes(-1, -2) if piece.transposed else part
    if config.tie_word_embeddings and style == "transformers":
        yield "lm_head.weight", state["embed_tokens"]


def state_from(
    given: Mapping[str, Any], state: Mapping[str, Any], config: MiniMaxM3Config, *, strict: bool
) -> tuple[dict[str, np.ndarray], IncompatibleKeys]:
    """New values on the host for the state tensors that `given` has, whole or in part; `state` fills the rest.

    Args:
      given: torch, NumPy or JAX tensors by name, in either style; they are copied.
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
    tied = {f"{style.head}lm_head.weight"} if config.tie_word_embeddings else set()
    missing = [name for name in known if name not in given]
    unexpected = [name for name in given if name not in known and name not in tied and not style.ignores(name)]
    problems = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected]
    problems = problems if strict else []
    for name, piece in known.items():
        if name in given and tuple(given[name].shape) != piece.shape:
            problems.append(f"{name}: shape {list(given[name].shape)}: must be {list(piece.shape)}")
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... {len(problems) - 20} more" if len(problems) > 20 else "")
        raise RuntimeError(f"state_dict does not fit the model:\n  {shown}")
    changed = (tensor for tensor in tensors.values() if any(piece.name in given for piece in tensor.pieces))
    return {tensor.name: _assembled(tensor, given, state) for tensor in changed}, IncompatibleKeys(missing, unexpected)


def _assembled(tensor: StateTensor, given: Mapping[str, Any], state: Mapping[str, Any]) -> np.ndarray:
    whole = np.array(state[tensor.name])
    for piece in tensor.pieces:
        if piece.name in given:
            part = _host(given[piece.name])
            whole[piece.state_index] = part.swapaxes(-1, -2) if piece.transposed else part
    return whole


def _host(tensor: Any) -> np.ndarray:
    """Any library's tensor on the host; torch's bfloat16, which NumPy does not know, as float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return np.asarray(tensor)


def _style(style: str) -> Style:
    if style not in ("transformers", "vendor"):
        raise ValueError(f"style = {style!r}: must be 'transformers' or 'vendor'")
    return STYLES[style]
