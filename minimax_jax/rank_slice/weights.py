"""One rank's random weights, drawn on the device: 8-bit ones as bytes, never as floats first."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.checkpoint import STYLES, state_tensors
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model import abstract_model, split_model
from minimax_jax.parallel import Layout
from minimax_jax.rank_slice.compiling import side_by_side
from minimax_jax.tensor_table import MXFP8_BLOCK
from minimax_kernels import Mxfp8, choose_experts

WEIGHTS = ("mxfp8", "bf16")
ROUTINGS = ("uniform", "skewed")
_BYTES_RMS = 101.6  # of e4m3 numbers whose bytes are equally likely, NaN excepted
_SKEW = 0.15  # standard deviation of the routers' biases, of which half make the choice; scores themselves have 0.2


def weight_structs(layout: Layout, weights: str, dtype: DTypeLike) -> dict[str, Any]:
    """Shapes and dtypes of one rank's weights by name; `Mxfp8` of them where they are in 8 bits.

    Args:
      weights: "mxfp8" or "bf16".
      dtype: of everything that is neither in 8 bits nor a router.
    """
    tensors = state_tensors(layout.config, STYLES["vendor"])
    _, whole = split_model(abstract_model(layout.config, dtype))
    structs: dict[str, Any] = {}
    for name, struct in whole.items():
        shape = layout.local_shape(struct.shape, layout.splits(name))
        if weights == "mxfp8" and all(piece.quantisable for piece in tensors[name].pieces):
            layout.check_blocks({name: struct.shape})
            *lead, inputs, outputs = shape
            values, scales = (*lead, outputs, inputs), (*lead, outputs, inputs // MXFP8_BLOCK)
            structs[name] = Mxfp8(_struct(values, jnp.float8_e4m3fn), _struct(scales, jnp.uint8))
        else:
            structs[name] = _struct(shape, struct.dtype)
    return structs


def draw_weights(config: MiniMaxM3Config, structs: Mapping[str, Any], routing: str, seed: int = 0) -> dict[str, Any]:
    """Random weights of those shapes; matrices keep activations of about the size they get.

    Args:
      config: of the whole model, whose widths decide how large weights are.
      routing: "uniform": routers choose all experts alike; "skewed": their biases favour some.
    """
    random = {name: struct for name, struct in structs.items() if _is_drawn(name, struct)}
    root = jax.random.key(seed, impl="rbg")
    size = np.float32()

    def compile_for(struct: Any) -> Any:
        if isinstance(struct, Mxfp8):
            return draw_mxfp8.lower(root, struct.shape, size).compile()
        return _draw.lower(root, struct.shape, struct.dtype, size).compile()

    # nearly all of the time is compilation: one program a shape, and they compile side by side
    kinds = {_kind(struct): functools.partial(compile_for, struct) for struct in random.values()}
    programs = side_by_side(kinds)
    state: dict[str, Any] = {}
    keys = iter(jax.random.split(root, len(random)))
    for name, struct in structs.items():
        if name in random:
            state[name] = programs[_kind(struct)](next(keys), np.float32(_size(config, name, struct, routing)))
        else:
            state[name] = jnp.zeros(struct.shape, struct.dtype)
    return state


def _is_drawn(name: str, struct: Any) -> bool:
    return len(struct.shape) > 1 or name.endswith("e_score_correction_bias")


def _kind(struct: Any) -> tuple[Any, ...]:
    """What decides which program draws a weight."""
    return isinstance(struct, Mxfp8), struct.shape, None if isinstance(struct, Mxfp8) else struct.dtype


def _size(config: MiniMaxM3Config, name: str, struct: Any, routing: str) -> float:
    """How large the numbers are: of MXFP8 the exponent of `draw_mxfp8`, else their standard deviation."""
    if isinstance(struct, Mxfp8):
        return mxfp8_exponent(config, name)
    if name.endswith("e_score_correction_bias"):
        return _SKEW if routing == "skewed" else 0.0
    return 1.0 if name == "embed_tokens" else _inputs(config, name) ** -0.5


def routing_load(
    config: MiniMaxM3Config, state: Mapping[str, Any], experts: range, tokens: int = 4096
) -> dict[int, list[float]]:
    """Of random tokens' choices in each layer with experts, by its number, the share that each of `experts` gets."""
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe(i)]
    if not layers:
        return {}
    gates = [
        (state[f"layers.{i}.mlp.gate.weight"], state[f"layers.{i}.mlp.gate.e_score_correction_bias"]) for i in layers
    ]

    @jax.jit
    def counts(gates: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        hidden = jax.random.normal(jax.random.key(1), (tokens, config.hidden_size))

        def one(gate: tuple[jax.Array, jax.Array]) -> jax.Array:
            weight, bias = gate
            chosen, _ = choose_experts(hidden @ weight, bias, num_chosen=config.num_experts_per_tok, impl="reference")
            return jnp.bincount(chosen.reshape(-1), length=config.num_local_experts)

        return jax.lax.map(one, jax.tree.map(lambda *each: jnp.stack(each), *gates))  # compiled once for all layers

    shares = np.asarray(counts(gates)) / (tokens * config.num_experts_per_tok)
    return {layer: [float(of[expert]) for expert in experts] for layer, of in zip(layers, shares, strict=True)}


def mxfp8_exponent(config: MiniMaxM3Config, name: str) -> float:
    """For `draw_mxfp8`, such that a matrix keeps activations of about the size they get."""
    return math.log2(_BYTES_RMS) + 0.5 * math.log2(_inputs(config, name))


def _struct(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _inputs(config: MiniMaxM3Config, name: str) -> int:
    """Inputs of a matrix in the whole model, over all ranks."""
    if name.endswith("self_attn.o_proj"):
        return config.num_attention_heads * config.head_dim
    if name.endswith("down_proj"):
        if ".experts." in name:
            return config.intermediate_size
        return config.shared_intermediate_size if "shared" in name else config.dense_intermediate_size
    return config.hidden_size


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: jax.Array) -> jax.Array:
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def draw_mxfp8(key: jax.Array, shape: tuple[int, ...], exponent: jax.Array | float) -> Mxfp8:
    """Bytes that are no NaN, with scales of one of three neighbouring powers of two around 2 ** -exponent.

    Args:
      shape: [..., K, N] of the matrices.
    """
    values, scales = jax.random.split(key)
    *lead, inputs, outputs = shape
    words = jax.random.bits(values, (*lead, outputs, inputs // 4), jnp.uint32)
    codes = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*lead, outputs, inputs)
    codes = jnp.where(codes & 0x7F == 0x7F, codes ^ 1, codes)
    around = jax.random.randint(scales, (*lead, outputs, inputs // MXFP8_BLOCK), -1, 2)
    return Mxfp8(
        jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn),
        (127 - jnp.round(exponent).astype(jnp.int32) + around).astype(jnp.uint8),
    )
