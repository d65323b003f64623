"""The MiniMax-M3 text model."""

from __future__ import annotations

import types
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model.attention import Attend, Attention
from minimax_jax.model.comm import SINGLE_DEVICE, Comm
from minimax_jax.model.linear import linear, normal_init
from minimax_jax.model.mlp import MLP
from minimax_jax.model.moe import MoE
from minimax_jax.model.norm import RMSNorm
from minimax_jax.model.record import ForwardRecord
from minimax_jax.model.rope import RopeTables, rope_tables


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP (or mixture of experts) with residuals."""

    def __init__(self, config: MiniMaxM3Config, layer_id: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, layer_id, dtype, rngs)
        if config.is_moe(layer_id):
            self.mlp: MLP | MoE = MoE(config, layer_id, dtype, rngs)
        else:
            self.mlp = MLP(config, config.dense_intermediate_size, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "T H"],
        update: Float[Array, "T H"] | None,
        rope: RopeTables,
        attend: Attend,
        comm: Comm,
        record: ForwardRecord | None = None,
    ) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
        """Takes and gives a hidden state as two parts, whose sum it is: the norm that comes next adds them up.

        Args:
          update: the layer before's; None for the first layer.
        """
        if update is None:
            normed = self.input_layernorm(x)
        else:
            x, normed = self.input_layernorm.of_sum(x, update)
        if record is not None:
            record.hidden_states.append(x)
        attended = comm.sum_tensor(self.self_attn(normed, rope, attend))
        x, normed = self.post_attention_layernorm.of_sum(x, attended)
        update = self.mlp(normed, comm, record) if isinstance(self.mlp, MoE) else self.mlp(normed)
        return x, comm.sum_mlp(update)


class MiniMaxM3(nnx.Module):
    """Embedding, decoder layers and head over flat tokens; no cache, no host state, no device choice.

    `embed`, `run_layers` and `head` are separate so that callers can splice in between. Matrices live in
    `dtype` (bfloat16 or float32), routers in float32, logits come in float32. Sizes are those of the config that
    is given: a rank that holds a part of the heads or experts passes a config with its own counts.
    """

    def __init__(self, config: MiniMaxM3Config, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Param(normal_init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List([DecoderLayer(config, i, dtype, rngs) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(normal_init(rngs.params(), (config.hidden_size, config.vocab_size), dtype))
        self.config = config

    def embed(self, input_ids: Int[Array, "T"], comm: Comm = SINGLE_DEVICE) -> Float[Array, "T H"]:
        """Token embeddings."""
        return comm.lookup(self.embed_tokens[...], input_ids)

    def run_layers(
        self,
        hidden: Float[Array, "T H"],
        positions: Int[Array, "T"],
        attend: Attend,
        comm: Comm = SINGLE_DEVICE,
        record: ForwardRecord | None = None,
    ) -> Float[Array, "T H"]:
        """All decoder layers; `positions` count from 0 in each request. `record` is filled on the way."""
        rope = rope_tables(positions, self.config.rope_theta, self.config.rotary_dim)
        update = None
        for layer in self.layers:
            hidden, update = layer(hidden, update, rope, attend, comm, record)
        if update is not None:
            hidden = hidden + update
        if record is not None:
            record.hidden_states.append(hidden)
        return hidden

    def rank_logits(self, hidden: Float[Array, "T H"]) -> Float[Array, "T V"]:
        """Final norm and logits in float32, of this rank's part of the vocabulary."""
        matrix = self.embed_tokens[...].T if self.config.tie_word_embeddings else self.lm_head.get_value()
        return linear(self.norm(hidden), matrix, jnp.float32)

    def head(self, hidden: Float[Array, "T H"], comm: Comm = SINGLE_DEVICE) -> Float[Array, "T V"]:
        """Final norm and logits in float32, of the whole vocabulary."""
        return comm.gather_vocab(self.rank_logits(hidden))

    def __call__(
        self, input_ids: Int[Array, "T"], positions: Int[Array, "T"], attend: Attend, comm: Comm = SINGLE_DEVICE
    ) -> Float[Array, "T V"]:
        return self.head(self.run_layers(self.embed(input_ids, comm), positions, attend, comm), comm)


State = dict[str, jax.Array]


def abstract_model(config: MiniMaxM3Config, dtype: DTypeLike = jnp.bfloat16) -> MiniMaxM3:
    """A model whose weights are shapes only; takes no memory."""
    # nnx.Rngs counts its draws in a traced variable; each write has JAX print the whole trace so far for an error that
    # is caught, so that the time grew with the square of the layers
    rngs = types.SimpleNamespace(params=lambda: jax.random.key(0))
    return nnx.eval_shape(lambda: MiniMaxM3(config, dtype=dtype, rngs=cast(nnx.Rngs, rngs)))


def split_model(model: MiniMaxM3) -> tuple[nnx.GraphDef, State]:
    """(graph definition, weights by dotted name such as "layers.3.self_attn.q_proj")."""
    graphdef, state = nnx.split(model, nnx.Param)
    named = {".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(state)}
    return graphdef, named


def merge_model(graphdef: nnx.GraphDef, weights: State) -> MiniMaxM3:
    """The model that `split_model` took apart; to be called inside a trace, with the weights as its inputs."""
    flat = {
        tuple(int(part) if part.isdigit() else part for part in name.split(".")): nnx.Param(value)
        for name, value in weights.items()
    }
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
