"""Which file tensors make up each tensor of the model's state, in every name style: pure data.

A `StateTensor` is tiled by `Piece`s. A piece is one whole file tensor, perhaps transposed, at a place in the
state tensor. Loading, loading only a range (`StateTensor.reads`), checking and saving all read this one table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.tensor_table import MXFP8_BLOCK, SCALE_SUFFIX

Range = tuple[int, int]
_MTP = re.compile(r"(^|\.)mtp\.")  # drafts that some checkpoints carry; transformers ignores them too


@dataclasses.dataclass(frozen=True)
class Style:
    """One way to name and to pack the text model's tensors.

    Attributes:
      name: "vendor", "transformers" or "transformers-vl".
      body, head: prefixes of the decoder and of `lm_head`.
      fused: gate and up, and all experts, are one tensor each (transformers); else one tensor per matrix.
      ignored: prefixes of tensors that are known but are no part of the text model.
    """

    name: str
    body: str
    head: str
    fused: bool
    ignored: tuple[str, ...] = ()

    def ignores(self, tensor: str) -> bool:
        """Whether a file tensor is known but is no part of the text model (vision, projector, drafts)."""
        return tensor.startswith(self.ignored) or is_draft(tensor)


STYLES = {
    style.name: style
    for style in (
        Style(
            "vendor",
            "language_model.model.",
            "language_model.",
            fused=False,
            ignored=("vision_tower.", "multi_modal_projector.", "patch_merge_mlp."),
        ),
        Style(
            "transformers-vl",  # the wrapper's names in memory; its save_pretrained writes the vendor's
            "model.language_model.",
            "",
            fused=True,
            ignored=("model.vision_tower.", "model.multi_modal_projector."),
        ),
        Style("transformers", "model.", "", fused=True),
    )
}


def is_draft(tensor: str) -> bool:
    """Whether a file tensor belongs to the modules that predict several tokens at once (MTP)."""
    return _MTP.search(tensor) is not None


def detect_style(names: Iterable[str]) -> Style | None:
    """The style most of whose decoder names occur, None if there is none."""
    votes = dict.fromkeys(STYLES, 0)
    for name in names:
        for style in STYLES.values():  # "model." is last, being a prefix of "model.language_model."
            if style.ignores(name):
                break
            if name.startswith(style.body):
                votes[style.name] += 1
                break
    best = max(votes, key=votes.__getitem__)
    return STYLES[best] if votes[best] else None


@dataclasses.dataclass(frozen=True)
class Read:
    """`file[file_index]` goes to `out[target]`, with the last two axes swapped if `transposed`."""

    piece: Piece
    file_index: tuple[slice, ...]
    target: tuple[int | slice, ...]

    @property
    def transposed(self) -> bool:
        """Whether the file holds the region as [..., out, in] and the state as [..., in, out]."""
        return self.piece.transposed


@dataclasses.dataclass(frozen=True)
class Piece:
    """One file tensor and its place in a state tensor.

    Attributes:
      name, shape: as stored; `shape` lacks the experts' axis where the file has one tensor per expert.
      start: where its region begins, on each axis of the state tensor.
      transposed: stored [..., out, in], in the state [..., in, out].
      quantisable: the MXFP8 checkpoint stores it as e4m3 with scales.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    transposed: bool = False
    quantisable: bool = False

    @property
    def region(self) -> tuple[Range, ...]:
        """The half-open range it fills, on each axis of the state tensor."""
        extents = (1,) * (len(self.start) - len(self.shape)) + self.shape
        return tuple((start, start + extent) for start, extent in zip(self.start, self._swap(extents), strict=True))

    @property
    def state_index(self) -> tuple[int | slice, ...]:
        """The index that cuts it out of the state tensor, for saving (then swap the last axes if transposed)."""
        lead = len(self.start) - len(self.shape)
        return tuple(begin if axis < lead else slice(begin, end) for axis, (begin, end) in enumerate(self.region))

    def read(self, ranges: tuple[Range, ...]) -> Read | None:
        """What of it lies within `ranges` of the state tensor; `target` counts from the ranges' beginning."""
        lead = len(self.start) - len(self.shape)
        file_index: list[slice] = []
        target: list[int | slice] = []
        for axis, ((begin, end), (low, high)) in enumerate(zip(self.region, ranges, strict=True)):
            first, last = max(begin, low), min(end, high)
            if first >= last:
                return None
            if axis < lead:
                target.append(first - low)
            else:
                target.append(slice(first - low, last - low))
                file_index.append(slice(first - begin, last - begin))
        return Read(self, self._swap(tuple(file_index)), tuple(target))

    @property
    def values(self) -> Piece:
        """The same file tensor among MXFP8 values, which lie in the state as they do in files."""
        return dataclasses.replace(self, start=self._swap(self.start), transposed=False)

    @property
    def scales(self) -> Piece:
        """The file tensor of this one's MXFP8 scales, at its place among those; inputs begin at 0."""
        shape = (*self.shape[:-1], self.shape[-1] // MXFP8_BLOCK)
        return dataclasses.replace(self.values, name=self.name + SCALE_SUFFIX, shape=shape, quantisable=False)

    def _swap(self, axes: tuple) -> tuple:
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else axes


@dataclasses.dataclass(frozen=True)
class StateTensor:
    """One tensor of the model's state and the file tensors that tile it.

    Attributes:
      name, shape: in the state; linears are [in, out].
      pieces: the file tensors; their regions tile `shape` without holes or overlaps.
      float32: kept in float32 whatever dtype is asked for (the router).
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    float32: bool = False

    def reads(self, ranges: tuple[Range, ...] | None = None) -> Iterator[Read]:
        """What to read for `state[ranges]` (half-open, one per axis; None: all), for any tensor or expert rank."""
        ranges = tuple((0, extent) for extent in self.shape) if ranges is None else ranges
        if len(ranges) != len(self.shape) or any(
            not 0 <= low <= high <= extent for (low, high), extent in zip(ranges, self.shape, strict=False)
        ):
            raise ValueError(f"{self.name}: ranges {ranges} must lie within {self.shape}")
        return (read for piece in self.pieces if (read := piece.read(ranges)) is not None)

    @property
    def values(self) -> StateTensor:
        """The same tensor as the values of an `Mxfp8`, [..., out, in]."""
        *lead, inputs, outputs = self.shape
        return StateTensor(self.name, (*lead, outputs, inputs), tuple(piece.values for piece in self.pieces))

    @property
    def scales(self) -> StateTensor:
        """The same tensor's MXFP8 scales, [..., out, in / 32], from the file's tensors of scales."""
        *lead, inputs, outputs = self.shape
        shape = (*lead, outputs, inputs // MXFP8_BLOCK)
        return StateTensor(self.name, shape, tuple(piece.scales for piece in self.pieces))


def state_tensors(config: MiniMaxM3Config, style: Style) -> dict[str, StateTensor]:
    """The text model's whole state in this style, by state name, in file order."""
    return {tensor.name: tensor for tensor in _tensors(config, style)}


def _tensors(c: MiniMaxM3Config, style: Style) -> Iterator[StateTensor]:
    hidden = c.hidden_size
    embedding = (c.vocab_size, hidden)
    yield StateTensor("embed_tokens", embedding, (Piece(f"{style.body}embed_tokens.weight", embedding, (0, 0)),))
    for layer_id in range(c.num_hidden_layers):
        name, file = f"layers.{layer_id}.", f"{style.body}layers.{layer_id}."
        yield _vector(f"{name}input_layernorm.weight", f"{file}input_layernorm.weight", hidden)
        yield from _attention(c, layer_id, f"{name}self_attn.", f"{file}self_attn.", style)
        yield _vector(f"{name}post_attention_layernorm.weight", f"{file}post_attention_layernorm.weight", hidden)
        if c.is_moe(layer_id):
            yield from _moe(c, f"{name}mlp.", f"{file}mlp." if style.fused else f"{file}block_sparse_moe.", style)
        else:
            yield from _gated_mlp(f"{name}mlp.", f"{file}mlp.", hidden, c.dense_intermediate_size, style)
    yield _vector("norm.weight", f"{style.body}norm.weight", hidden)
    if not c.tie_word_embeddings:
        yield _linear("lm_head", hidden, [(f"{style.head}lm_head.weight", c.vocab_size)], quantisable=False)


def _vector(name: str, file: str, size: int, *, float32: bool = False) -> StateTensor:
    return StateTensor(name, (size,), (Piece(file, (size,), (0,)),), float32)


def _linear(
    name: str, inputs: int, parts: list[tuple[str, int]], *, quantisable: bool = True, float32: bool = False
) -> StateTensor:
    """[in, out]; each part is a file tensor [its outputs, in], side by side."""
    pieces, outputs = [], 0
    for file, size in parts:
        pieces.append(Piece(file, (size, inputs), (0, outputs), transposed=True, quantisable=quantisable))
        outputs += size
    return StateTensor(name, (inputs, outputs), tuple(pieces), float32)


def _attention(c: MiniMaxM3Config, layer_id: int, name: str, file: str, style: Style) -> Iterator[StateTensor]:
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for part, inputs, outputs in (
        ("q_proj", c.hidden_size, query),
        ("k_proj", c.hidden_size, key),
        ("v_proj", c.hidden_size, key),
        ("o_proj", query, c.hidden_size),
    ):
        yield _linear(name + part, inputs, [(f"{file}{part}.weight", outputs)])
    for part in ("q_norm", "k_norm"):
        yield _vector(f"{name}{part}.weight", f"{file}{part}.weight", c.head_dim)
    if c.is_sparse(layer_id):
        index = f"{file}indexer." if style.fused else f"{file}index_"
        for part, outputs in (("q_proj", c.index_n_heads * c.index_head_dim), ("k_proj", c.index_head_dim)):
            yield _linear(f"{name}index_{part}", c.hidden_size, [(f"{index}{part}.weight", outputs)])
        for part in ("q_norm", "k_norm"):
            yield _vector(f"{name}index_{part}.weight", f"{index}{part}.weight", c.index_head_dim)


def _gated_mlp(name: str, file: str, hidden: int, width: int, style: Style) -> Iterator[StateTensor]:
    if style.fused:
        gate_up = [(f"{file}gate_up_proj.weight", 2 * width)]
    else:
        gate_up = [(f"{file}gate_proj.weight", width), (f"{file}up_proj.weight", width)]
    yield _linear(f"{name}gate_up_proj", hidden, gate_up)
    yield _linear(f"{name}down_proj", width, [(f"{file}down_proj.weight", hidden)])


def _moe(c: MiniMaxM3Config, name: str, file: str, style: Style) -> Iterator[StateTensor]:
    hidden, width, experts = c.hidden_size, c.intermediate_size, c.num_local_experts
    bias = f"{file}gate.e_score_correction_bias" if style.fused else f"{file}e_score_correction_bias"
    yield _linear(f"{name}gate.weight", hidden, [(f"{file}gate.weight", experts)], quantisable=False, float32=True)
    yield _vector(f"{name}gate.e_score_correction_bias", bias, experts, float32=True)
    if style.fused:
        gate_up = [Piece(f"{file}experts.gate_up_proj", (experts, 2 * width, hidden), (0, 0, 0), True)]
        down = [Piece(f"{file}experts.down_proj", (experts, hidden, width), (0, 0, 0), True)]
    else:  # w1 = gate, w3 = up, w2 = down
        gate_up, down = [], []
        for expert in range(experts):
            each = f"{file}experts.{expert}."
            gate_up.append(Piece(f"{each}w1.weight", (width, hidden), (expert, 0, 0), True, True))
            gate_up.append(Piece(f"{each}w3.weight", (width, hidden), (expert, 0, width), True, True))
            down.append(Piece(f"{each}w2.weight", (hidden, width), (expert, 0, 0), True, True))
    yield StateTensor(f"{name}experts.gate_up_proj", (experts, hidden, 2 * width), tuple(gate_up))
    yield StateTensor(f"{name}experts.down_proj", (experts, width, hidden), tuple(down))
    yield from _gated_mlp(f"{name}shared_experts.", f"{file}shared_experts.", hidden, c.shared_intermediate_size, style)
