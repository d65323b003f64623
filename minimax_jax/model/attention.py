"""The attention layer around the boundary: projections, norms and RoPE; `attend` does the rest."""

from __future__ import annotations

from typing import Protocol

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model.linear import linear, normal_init
from minimax_jax.model.norm import RMSNorm
from minimax_jax.model.rope import RopeTables
from minimax_kernels import project_norm_rope


class Attend(Protocol):
    """How attention meets its context: no cache, functional caches, or a boundary to the host."""

    def __call__(
        self,
        layer_id: int,
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        idx_q: Float[Array, "T Hi Di"] | None,
        idx_k: Float[Array, "T 1 Di"] | None,
    ) -> Float[Array, "T Hq*D"]:
        """Attended values; the index operands are None on dense layers."""
        ...


class Attention(nnx.Module):
    """Grouped-query attention with per-head QK norm, partial RoPE and, on sparse layers, the index branch."""

    def __init__(self, config: MiniMaxM3Config, layer_id: int, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, head_dim, index_dim = config.hidden_size, config.head_dim, config.index_head_dim

        def weight(rows: int, columns: int) -> nnx.Param:
            return nnx.Param(normal_init(rngs.params(), (rows, columns), dtype))

        self.q_proj = weight(hidden, config.num_attention_heads * head_dim)
        self.k_proj = weight(hidden, config.num_key_value_heads * head_dim)
        self.v_proj = weight(hidden, config.num_key_value_heads * head_dim)
        self.o_proj = weight(config.num_attention_heads * head_dim, hidden)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype)
        self.sparse = config.is_sparse(layer_id)
        if self.sparse:
            self.index_q_proj = weight(hidden, config.index_n_heads * index_dim)
            self.index_k_proj = weight(hidden, index_dim)
            self.index_q_norm = RMSNorm(index_dim, config.rms_norm_eps, dtype)
            self.index_k_norm = RMSNorm(index_dim, config.rms_norm_eps, dtype)
        self.config = config
        self.layer_id = layer_id

    def __call__(self, x: Float[Array, "T H"], rope: RopeTables, attend: Attend) -> Float[Array, "T H"]:
        """The result is this rank's part of the sum over tensor ranks."""
        weights = [self.q_proj, self.k_proj, self.v_proj]
        norms: list[RMSNorm | None] = [self.q_norm, self.k_norm, None]
        if self.sparse:
            weights += [self.index_q_proj, self.index_k_proj]
            norms += [self.index_q_norm, self.index_k_norm]
        q, k, v, *index = project_norm_rope(
            x,
            tuple(weight.get_value() for weight in weights),
            tuple(None if norm is None else norm.weight[...] for norm in norms),
            rope.cos,
            rope.sin,
            eps=self.config.rms_norm_eps,
            # selection has no gradient, and the index branch learns from its own loss alone (MSA, training)
            detached=len(weights) - 3,
        )
        idx_q, idx_k = index if self.sparse else (None, None)
        attended = attend(self.layer_id, q, k, v, idx_q, idx_k)
        return linear(attended.astype(x.dtype), self.o_proj.get_value())
