"""MiniMax-M3's configuration: one frozen, validated dataclass for every form the config.json takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FULL_ATTENTION, SPARSE_ATTENTION = "full_attention", "minimax_m3_sparse"
DENSE_MLP, MOE_MLP = "dense", "sparse"


class ConfigError(ValueError):
    """A configuration that cannot be: each line names a key, its value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower and of the projector into the text model (counted, not built yet)."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    projector_hidden_size: int = 6144
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class MiniMaxM3Config:
    """Everything that decides the shapes and the maths of a MiniMax-M3 text model.

    Field names are transformers' (`MiniMaxM3VLTextConfig`); `from_dict` also reads the vendor's names.
    The defaults are the released M3's. Unknown keys of the file stay in `extra`, untouched.

    Raises:
      ConfigError: on construction, if any value is impossible; the message lists all of them.
    """

    vocab_size: int = 200064
    hidden_size: int = 6144
    num_hidden_layers: int = 60
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 1048576
    rope_theta: float = 5e6
    rotary_dim: int = 64
    dense_intermediate_size: int = 12288
    intermediate_size: int = 3072
    shared_intermediate_size: int = 3072
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    swiglu_beta: float = 1.0
    layer_types: tuple[str, ...] = (FULL_ATTENTION,) * 3 + (SPARSE_ATTENTION,) * 57
    mlp_layer_types: tuple[str, ...] = (DENSE_MLP,) * 3 + (MOE_MLP,) * 57
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_block_size: int = 128
    index_topk_blocks: int = 16
    index_init_blocks: int = 0
    index_local_blocks: int = 1
    bos_token_id: int | None = None  # read from a file, these two default to 200034 and 200020 where they exist
    eos_token_id: int | tuple[int, ...] | None = None
    vision: VisionConfig | None = None
    quantization: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError("impossible configuration:\n  " + "\n  ".join(problems))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MiniMaxM3Config:
        """Reads a parsed config.json: vendor (with or without `text_config`) or transformers.

        Raises:
          ConfigError: for missing keys, unsupported variants and impossible values, all in one message.
        """
        from minimax_jax.config_formats import parse_config

        return parse_config(config)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> MiniMaxM3Config:
        """Reads `directory/config.json`; the name "tiny" stands for the embedded checkpoint.

        Raises:
          FileNotFoundError: if there is no config.json.
          ConfigError: if it is not JSON or not a possible MiniMax-M3 configuration.
        """
        from minimax_jax.paths import model_directory

        path = model_directory(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model directory holds a config.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers too long to read
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
        try:
            return cls.from_dict(content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def m3(cls) -> MiniMaxM3Config:
        """The released MiniMax-M3 (BF16, 427B parameters)."""
        from minimax_jax.presets import m3_config_json

        return cls.from_dict(m3_config_json())

    @classmethod
    def m3_mxfp8(cls) -> MiniMaxM3Config:
        """The released MiniMax-M3-MXFP8."""
        from minimax_jax.presets import m3_mxfp8_config_json

        return cls.from_dict(m3_mxfp8_config_json())

    def to_dict(self, style: str = "vendor") -> dict[str, Any]:
        """The config.json content, `style` "vendor" (wrapper with `text_config`) or "transformers" (text only)."""
        from minimax_jax.config_formats import config_to_dict

        return config_to_dict(self, style)

    def replace(self, **changes: Any) -> MiniMaxM3Config:
        """A validated copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def is_sparse(self, layer_id: int) -> bool:
        """Whether the attention of this layer is block-sparse (has an index branch)."""
        return self.layer_types[layer_id] == SPARSE_ATTENTION

    def is_moe(self, layer_id: int) -> bool:
        """Whether the MLP of this layer is a mixture of experts."""
        return self.mlp_layer_types[layer_id] == MOE_MLP

    @property
    def is_mxfp8(self) -> bool:
        """Whether linear weights are stored as e4m3 values with e8m0 scales per 32 inputs."""
        return self.quantization is not None and self.quantization.get("quant_method") == "mxfp8"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end-of-text ids, possibly none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def num_parameters(self) -> int:
        """Parameters of the whole checkpoint, vision tower and projector included when configured."""
        from minimax_jax.tensor_table import count_parameters

        return sum(count_parameters(self).values())


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and not an infinite one or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


LARGEST_INT = 2**31 - 1  # sizes and positions are int32 in the arrays


_POSITIVE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rotary_dim dense_intermediate_size intermediate_size shared_intermediate_size "
    "num_local_experts num_experts_per_tok index_n_heads index_head_dim index_block_size index_topk_blocks"
).split()


def _problems(c: MiniMaxM3Config) -> list[str]:
    """Every impossible value, one line each."""
    found: list[str] = []

    def require(holds: bool, key: str, allowed: str) -> None:
        if not holds:
            found.append(f"{key} = {getattr(c, key)!r}: must be {allowed}")

    for key in (*_POSITIVE, "n_shared_experts", "index_init_blocks", "index_local_blocks"):
        value = getattr(c, key)
        least = 1 if key in _POSITIVE else 0
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole and value >= least, key, f"an integer >= {least}")
        require(not whole or value <= LARGEST_INT, key, f"at most {LARGEST_INT}")
    for key in ("rms_norm_eps", "rope_theta", "swiglu_limit"):
        value = getattr(c, key)
        require(is_finite(value) and value > 0, key, "a finite number > 0")
    for key in ("routed_scaling_factor", "swiglu_alpha", "swiglu_beta"):
        require(is_finite(getattr(c, key)), key, "a finite number")
    require(isinstance(c.tie_word_embeddings, bool), "tie_word_embeddings", "true or false")
    if found:
        return found  # the relations below would only repeat what the types already say

    heads, kv_heads, index_heads = c.num_attention_heads, c.num_key_value_heads, c.index_n_heads
    require(heads % kv_heads == 0, "num_attention_heads", f"a multiple of num_key_value_heads = {kv_heads}")
    require(
        heads % index_heads == 0 and (kv_heads % index_heads == 0 or index_heads % kv_heads == 0),
        "index_n_heads",
        f"a divisor of num_attention_heads = {heads} and a divisor or multiple of num_key_value_heads = {kv_heads}",
    )
    require(
        c.rotary_dim % 2 == 0 and c.rotary_dim <= min(c.head_dim, c.index_head_dim),
        "rotary_dim",
        f"even and at most head_dim = {c.head_dim} and index_head_dim = {c.index_head_dim}",
    )
    require(c.index_block_size & (c.index_block_size - 1) == 0, "index_block_size", "a power of two")
    forced = c.index_init_blocks + c.index_local_blocks
    require(
        c.index_topk_blocks >= forced,
        "index_topk_blocks",
        f"at least index_init_blocks + index_local_blocks = {forced} (forced blocks count inside the top-k)",
    )
    require(
        c.num_experts_per_tok <= c.num_local_experts,
        "num_experts_per_tok",
        f"at most num_local_experts = {c.num_local_experts}",
    )
    require(c.n_shared_experts == 1, "n_shared_experts", "1 (the only form that MiniMax-M3 has)")
    _require_layer_list(c, "layer_types", (FULL_ATTENTION, SPARSE_ATTENTION), found)
    _require_layer_list(c, "mlp_layer_types", (DENSE_MLP, MOE_MLP), found)
    for key, ids in (("eos_token_id", c.eos_token_ids), ("bos_token_id", (c.bos_token_id,))):
        inside = all(i is None or (isinstance(i, int) and 0 <= i < c.vocab_size) for i in ids)
        require(inside, key, f"null or within 0..{c.vocab_size - 1}")
    return found


def _require_layer_list(c: MiniMaxM3Config, key: str, allowed: tuple[str, str], found: list[str]) -> None:
    value = getattr(c, key)
    if len(value) != c.num_hidden_layers:
        found.append(f"{key} has {len(value)} entries: must be num_hidden_layers = {c.num_hidden_layers}")
    for layer_id, kind in enumerate(value):
        if kind not in allowed:
            found.append(f"{key}[{layer_id}] = {kind!r}: must be one of {allowed[0]!r}, {allowed[1]!r}")
            break
