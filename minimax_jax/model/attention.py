"""The attention layer around the boundary: projections, norms and RoPE; `attend` does the rest."""

from __future__ import annotations

from typing import Protocol

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model.linear import linear, normal_init
from minimax_jax.model.norm import RMSNorm
from minimax_jax.model.rope import RopeTables
from minimax_kernels import Mxfp8, matmul, norm_rope


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
        num_tokens, head_dim, index_dim = x.shape[0], self.config.head_dim, self.config.index_head_dim

        def heads(product: Array, channels: int) -> Array:
            return product.reshape(num_tokens, -1, channels)

        q, k, v, *index = self._project(x)
        turned = [heads(q, head_dim), heads(k, head_dim), *(heads(x, index_dim) for x in index)]
        norms = [self.q_norm, self.k_norm, *([self.index_q_norm, self.index_k_norm] if self.sparse else [])]
        weights = tuple(norm.weight[...] for norm in norms)
        q, k, *index = norm_rope(tuple(turned), weights, rope.cos, rope.sin, eps=self.config.rms_norm_eps)
        idx_q, idx_k = index if self.sparse else (None, None)
        attended = attend(self.layer_id, q, k, heads(v, head_dim), idx_q, idx_k)
        return linear(attended.astype(x.dtype), self.o_proj.get_value())

    def _project(self, x: Float[Array, "T H"]) -> tuple[Float[Array, "T N"], ...]:
        """q, k, v and on sparse layers the index branch's q and k, before norms."""
        main = (self.q_proj.get_value(), self.k_proj.get_value(), self.v_proj.get_value())
        if not self.sparse:
            return matmul(x, main)
        index = (self.index_q_proj.get_value(), self.index_k_proj.get_value())
        if isinstance(main[0], Mxfp8):  # nothing is trained in 8 bits: one launch
            return matmul(x, main + index)
        # selection has no gradient, and the index branch learns from its own loss alone (MSA, training)
        return matmul(x, main) + matmul(jax.lax.stop_gradient(x), index)
