"""One random model twice: in transformers (torch) and as weights of ours, taken from its state_dict.

Import it after `pytest.importorskip("torch")` and `pytest.importorskip("transformers")`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from minimax_jax.attention import ReferenceAttend
from minimax_jax.checkpoint import STYLES, state_tensors
from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION, MiniMaxM3Config
from minimax_jax.model import abstract_model, merge_model, split_model

State = dict[str, jax.Array]


def pair_config(*, layers: int = 3, dense: int = 1, **changes: Any) -> MiniMaxM3Config:
    """A small configuration whose first `dense` layers have full attention and a dense MLP, the others neither."""
    sizes = MiniMaxM3Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, rotary_dim=32, dense_intermediate_size=96, intermediate_size=32, shared_intermediate_size=48,
        num_local_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=64, index_block_size=16,
        index_topk_blocks=3, layer_types=(FULL_ATTENTION,) * dense + (SPARSE_ATTENTION,) * (layers - dense),
        mlp_layer_types=(DENSE_MLP,) * dense + (MOE_MLP,) * (layers - dense),
    )  # fmt: skip
    return sizes.replace(**changes)


def text_config(config: MiniMaxM3Config) -> Any:
    """transformers' own configuration, with the attention whose maths is spelled out there."""
    result = transformers.MiniMaxM3VLTextConfig(**config.to_dict("transformers"))
    result._attn_implementation = "eager"
    return result


def randomise(module: Any, seed: int = 0) -> None:
    """Random weights that matter: matrices keep the scale of what they multiply, norms and biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(noise * (0.2 if "bias" in name else 0.4))
            else:
                tensor.copy_(noise * 1.5 * tensor.shape[-1] ** -0.5)


def torch_model(config: MiniMaxM3Config, seed: int = 0) -> Any:
    model = transformers.MiniMaxM3VLForCausalLM(text_config(config)).eval()
    randomise(model, seed)
    return model


def weights_of(model: Any, config: MiniMaxM3Config, dtype: Any = jnp.float32) -> State:
    """Our weights by the name map that loads checkpoints."""
    stored = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    weights = {}
    for name, tensor in state_tensors(config, STYLES["transformers"]).items():
        whole = np.empty(tensor.shape, np.float32)
        for piece in tensor.pieces:
            part = stored[piece.name]
            whole[piece.state_index] = np.swapaxes(part, -1, -2) if piece.transposed else part
        weights[name] = jnp.asarray(whole, jnp.float32 if tensor.float32 else dtype)
    return weights


def part_of(weights: State, prefix: str) -> State:
    """The weights of one module, by their names inside it."""
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def forward(config: MiniMaxM3Config, num_tokens: int, dtype: Any = jnp.float32):
    """jitted (weights, ids [num_tokens], live tokens) -> logits; ids past the live ones are padding."""
    graphdef, _ = split_model(abstract_model(config, dtype))

    @jax.jit
    def run(weights: State, ids: jax.Array, live: jax.Array) -> jax.Array:
        starts = jnp.stack([jnp.zeros_like(live), live])
        attend = ReferenceAttend(config, starts, num_tokens)
        return merge_model(graphdef, weights)(ids, jnp.arange(num_tokens), attend)

    return run
