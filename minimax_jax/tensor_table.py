"""Every tensor of a MiniMax-M3 checkpoint: vendor name, shape, dtype, component.

From this table parameters are counted and memory is estimated, vision part included; which of the tensors make
up the model's state is `minimax_jax.checkpoint.names`' matter. Shapes are [out, in], as stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from minimax_jax.config import MiniMaxM3Config, VisionConfig

MXFP8_BLOCK = 32  # inputs that share one e8m0 scale (quantization_config.weight_block_size = [1, 32])
SCALE_SUFFIX = "_scale_inv"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One stored tensor; `dtype` in safetensors' spelling (BF16, F32, F8_E4M3, U8)."""

    shape: tuple[int, ...]
    dtype: str
    component: str

    @property
    def size(self) -> int:
        """Elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes as stored."""
        return self.size * {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}[self.dtype]

    @property
    def is_parameter(self) -> bool:
        """False for MXFP8 scales, which are part of a weight's encoding."""
        return self.dtype != "U8"


def tensor_table(config: MiniMaxM3Config) -> dict[str, TensorSpec]:
    """All tensors under the vendor's names, in file order; MXFP8 configs list values and scales."""
    table: dict[str, TensorSpec] = {}
    for name, spec, quantisable in _tensors(config):
        if config.is_mxfp8 and quantisable:
            out_features, in_features = spec.shape
            table[name] = dataclasses.replace(spec, dtype="F8_E4M3")
            table[name + SCALE_SUFFIX] = TensorSpec((out_features, in_features // MXFP8_BLOCK), "U8", spec.component)
        else:
            table[name] = spec
    return table


def count_parameters(config: MiniMaxM3Config) -> dict[str, int]:
    """Parameters by component, largest first."""
    counts: dict[str, int] = {}
    for _, spec, _ in _tensors(config):
        counts[spec.component] = counts.get(spec.component, 0) + spec.size
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def active_parameters(config: MiniMaxM3Config) -> dict[str, int]:
    """Parameters by component that one token meets in the text layers.

    Of the routed experts its share; nothing of the embedding and the head, the convention behind "23B active"
    of the released model; nothing of the vision part.
    """
    counts = count_parameters(config)
    for component in ("embedding", "head", "vision tower", "projector"):
        if component in counts:
            counts[component] = 0
    if "routed experts" in counts:
        counts["routed experts"] = counts["routed experts"] * config.num_experts_per_tok // config.num_local_experts
    return counts


def cache_bytes_per_token(
    config: MiniMaxM3Config, num_key_value_heads: int | None = None, itemsize: int = 2, index_ranks: int = 1
) -> int:
    """Bytes that one token of context takes in the caches of all layers: keys, values and index keys.

    Args:
      num_key_value_heads: of one rank; None for all.
      itemsize: bytes of a cached value.
      index_ranks: ranks over which index keys are split; by default every rank has them all.
    """
    heads = config.num_key_value_heads if num_key_value_heads is None else num_key_value_heads
    sparse_layers = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    index = sparse_layers * config.index_head_dim * itemsize
    return 2 * config.num_hidden_layers * heads * config.head_dim * itemsize + index // index_ranks


def _tensors(c: MiniMaxM3Config) -> Iterator[tuple[str, TensorSpec, bool]]:
    """(vendor name, spec in the BF16 checkpoint, whether the MXFP8 checkpoint quantises it)."""
    hidden = c.hidden_size
    yield "language_model.model.embed_tokens.weight", TensorSpec((c.vocab_size, hidden), "BF16", "embedding"), False
    for layer_id in range(c.num_hidden_layers):
        prefix = f"language_model.model.layers.{layer_id}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", TensorSpec((hidden,), "BF16", "norms"), False
        yield from _attention(c, layer_id, prefix + "self_attn.")
        if c.is_moe(layer_id):
            yield from _moe(c, prefix + "block_sparse_moe.")
        else:
            yield from _gated_mlp(prefix + "mlp.", hidden, c.dense_intermediate_size, "dense MLPs")
    yield "language_model.model.norm.weight", TensorSpec((hidden,), "BF16", "norms"), False
    if not c.tie_word_embeddings:
        yield "language_model.lm_head.weight", TensorSpec((c.vocab_size, hidden), "BF16", "head"), False
    if c.vision is not None:
        for name, shape, dtype, component in _vision(c.vision, hidden):
            yield name, TensorSpec(shape, dtype, component), False


def _attention(c: MiniMaxM3Config, layer_id: int, prefix: str) -> Iterator[tuple[str, TensorSpec, bool]]:
    hidden, query, key = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, shape in (
        ("q_proj", (query, hidden)),
        ("k_proj", (key, hidden)),
        ("v_proj", (key, hidden)),
        ("o_proj", (hidden, query)),
    ):
        yield f"{prefix}{name}.weight", TensorSpec(shape, "BF16", "attention"), True
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}{name}.weight", TensorSpec((c.head_dim,), "BF16", "norms"), False
    if c.is_sparse(layer_id):
        for name, rows in (("index_q_proj", c.index_n_heads * c.index_head_dim), ("index_k_proj", c.index_head_dim)):
            yield f"{prefix}{name}.weight", TensorSpec((rows, hidden), "BF16", "index branch"), True
        for name in ("index_q_norm", "index_k_norm"):
            yield f"{prefix}{name}.weight", TensorSpec((c.index_head_dim,), "BF16", "norms"), False


def _gated_mlp(prefix: str, hidden: int, width: int, component: str) -> Iterator[tuple[str, TensorSpec, bool]]:
    for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
        yield f"{prefix}{name}.weight", TensorSpec(shape, "BF16", component), True


def _moe(c: MiniMaxM3Config, prefix: str) -> Iterator[tuple[str, TensorSpec, bool]]:
    hidden, width = c.hidden_size, c.intermediate_size
    yield f"{prefix}gate.weight", TensorSpec((c.num_local_experts, hidden), "F32", "routers"), False
    yield f"{prefix}e_score_correction_bias", TensorSpec((c.num_local_experts,), "F32", "routers"), False
    for expert in range(c.num_local_experts):
        for name, shape in (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden))):
            yield f"{prefix}experts.{expert}.{name}.weight", TensorSpec(shape, "BF16", "routed experts"), True
    yield from _gated_mlp(prefix + "shared_experts.", hidden, c.shared_intermediate_size, "shared experts")


def _vision(v: VisionConfig, text_hidden: int) -> Iterator[tuple[str, tuple[int, ...], str, str]]:
    hidden, wide = v.hidden_size, v.intermediate_size
    tower = "vision_tower.vision_model."
    patch = (hidden, v.num_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield f"{tower}embeddings.patch_embedding.weight", patch, "F32", "vision tower"
    yield f"{tower}pre_layrnorm.weight", (hidden,), "BF16", "vision tower"
    yield f"{tower}pre_layrnorm.bias", (hidden,), "BF16", "vision tower"
    linears = [(f"self_attn.{name}_proj", (hidden, hidden)) for name in ("q", "k", "v", "out")]
    linears += [("mlp.fc1", (wide, hidden)), ("mlp.fc2", (hidden, wide))]
    for layer_id in range(v.num_hidden_layers):
        prefix = f"{tower}encoder.layers.{layer_id}."
        for name, shape in linears:
            yield f"{prefix}{name}.weight", shape, "BF16", "vision tower"
            yield f"{prefix}{name}.bias", shape[:1], "BF16", "vision tower"
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{prefix}{name}.weight", (hidden,), "BF16", "vision tower"
            yield f"{prefix}{name}.bias", (hidden,), "BF16", "vision tower"
    middle, merged = v.projector_hidden_size, text_hidden * v.spatial_merge_size**2
    for name, shape in (
        ("multi_modal_projector.linear_1", (middle, hidden)),
        ("multi_modal_projector.linear_2", (text_hidden, middle)),
        ("patch_merge_mlp.linear_1", (middle, merged)),
        ("patch_merge_mlp.linear_2", (text_hidden, middle)),
    ):
        yield f"{name}.weight", shape, "BF16", "projector"
        yield f"{name}.bias", shape[:1], "BF16", "projector"
