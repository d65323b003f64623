"""Small configurations and checkpoints for these tests, made without the code under test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION, MiniMaxM3Config
from minimax_jax.tensor_table import tensor_table

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
NUMPY_DTYPES = {"BF16": BF16, "F32": np.dtype(np.float32), "F8_E4M3": E4M3, "U8": np.dtype(np.uint8)}


def small_config(**changes: Any) -> MiniMaxM3Config:
    """Three layers: dense with full attention, then two with experts and sparse attention."""
    sizes = MiniMaxM3Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        rotary_dim=16, dense_intermediate_size=128, intermediate_size=32, shared_intermediate_size=96,
        num_local_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=16, index_block_size=16,
        index_topk_blocks=2, layer_types=(FULL_ATTENTION, SPARSE_ATTENTION, SPARSE_ATTENTION),
        mlp_layer_types=(DENSE_MLP, MOE_MLP, MOE_MLP),
    )  # fmt: skip
    return sizes.replace(**changes)


def mxfp8_config(**changes: Any) -> MiniMaxM3Config:
    return small_config(quantization={"quant_method": "mxfp8", "weight_block_size": [1, 32]}, **changes)


def vendor_tensors(config: MiniMaxM3Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors in the vendor's layout; e4m3 bytes without NaN, scale bytes around 1."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, spec in tensor_table(config).items():
        dtype = NUMPY_DTYPES[spec.dtype]
        if spec.dtype == "F8_E4M3":
            sign = random.integers(0, 2, spec.shape) << 7
            tensors[name] = (random.integers(0, 0x7F, spec.shape) | sign).astype(np.uint8).view(E4M3)
        elif spec.dtype == "U8":
            tensors[name] = random.integers(110, 130, spec.shape).astype(np.uint8)
        else:
            tensors[name] = random.standard_normal(spec.shape, np.float32).astype(dtype)
    return tensors


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(contiguous, directory / name, metadata={"format": "pt"})


def vendor_state(config: MiniMaxM3Config, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state that a vendor checkpoint stands for, spelled out tensor by tensor, in float32."""

    def get(name: str) -> np.ndarray:
        value = tensors[f"language_model.{name}"]
        scale = tensors.get(f"language_model.{name}_scale_inv")
        value = value.astype(np.float64)
        if scale is not None:
            value = value * 2.0 ** (np.repeat(scale.astype(np.int64), 32, axis=-1) - 127)
        return value.astype(np.float32)

    def gated(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        gate, up, down = (get(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down"))
        return np.concatenate([gate.T, up.T], axis=1), down.T

    state = {"embed_tokens": get("model.embed_tokens.weight"), "norm.weight": get("model.norm.weight")}
    if not config.tie_word_embeddings:
        state["lm_head"] = get("lm_head.weight").T
    for i in range(config.num_hidden_layers):
        layer, file = f"layers.{i}", f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            state[f"{layer}.{norm}.weight"] = get(f"{file}.{norm}.weight")
        linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if config.is_sparse(i):
            linears += ["index_q_proj", "index_k_proj"]
            for norm in ("index_q_norm", "index_k_norm"):
                state[f"{layer}.self_attn.{norm}.weight"] = get(f"{file}.self_attn.{norm}.weight")
        for linear in linears:
            state[f"{layer}.self_attn.{linear}"] = get(f"{file}.self_attn.{linear}.weight").T
        if not config.is_moe(i):
            state[f"{layer}.mlp.gate_up_proj"], state[f"{layer}.mlp.down_proj"] = gated(f"{file}.mlp")
            continue
        moe = f"{file}.block_sparse_moe"
        state[f"{layer}.mlp.gate.weight"] = get(f"{moe}.gate.weight").T
        state[f"{layer}.mlp.gate.e_score_correction_bias"] = get(f"{moe}.e_score_correction_bias")
        experts = range(config.num_local_experts)
        w1, w2, w3 = (np.stack([get(f"{moe}.experts.{e}.{w}.weight").T for e in experts]) for w in ("w1", "w2", "w3"))
        state[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=2)
        state[f"{layer}.mlp.experts.down_proj"] = w2
        shared = gated(f"{moe}.shared_experts")
        state[f"{layer}.mlp.shared_experts.gate_up_proj"], state[f"{layer}.mlp.shared_experts.down_proj"] = shared
    return state


def is_router(name: str) -> bool:
    return ".mlp.gate." in name


def cast_state(state: dict[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """As the loader gives it: everything in `dtype`, the router in float32."""
    return {name: value.astype(np.float32 if is_router(name) else dtype) for name, value in state.items()}


def random_state(config: MiniMaxM3Config, dtype: np.dtype = BF16, seed: int = 0) -> dict[str, np.ndarray]:
    tensors = vendor_tensors(config.replace(quantization=None), seed)
    wide = {name: value.astype(np.float32) for name, value in tensors.items()}
    return cast_state(vendor_state(config, wide), dtype)


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit, dtypes included."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        left, right = np.ascontiguousarray(actual[name]), np.ascontiguousarray(value)
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        assert left.tobytes() == right.tobytes(), name
