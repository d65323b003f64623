"""Attention for training the embedded checkpoint: sequences of one length, dense or sparse, with the index loss."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_jax.config import MiniMaxM3Config
from minimax_kernels import Batch, select_blocks


class TrainingAttend:
    """`attend` over R sequences of L tokens each, in plain jnp over chunks of queries.

    Each call on a sparse layer with `index_loss` adds one term to `index_losses`: the mean Kullback-Leibler
    divergence from the main branch's share of attention per block (mean over the query heads of a KV group,
    detached) to the index branch's softmax over block scores, as in MSA's training (arXiv 2606.13392).

    Args:
      mode: "dense" attends to everything; "sparse" to the selected blocks, as inference does.
      index_loss: whether to compute the loss of the index branch.
      chunk: queries worked on at once.
    """

    def __init__(
        self, config: MiniMaxM3Config, sequences: int, length: int, *, mode: str, index_loss: bool, chunk: int = 512
    ):
        if mode not in ("dense", "sparse"):
            raise ValueError(f"mode = {mode!r}: must be 'dense' or 'sparse'")
        self.config, self.sequences, self.length = config, sequences, length
        self.mode, self.index_loss, self.chunk = mode, index_loss, min(chunk, length)
        if length % self.chunk or length % config.index_block_size:
            raise ValueError(f"length = {length}: must be a multiple of {self.chunk} and {config.index_block_size}")
        self.index_losses: list[Array] = []

    def __call__(
        self,
        layer_id: int,
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        idx_q: Float[Array, "T Hi Di"] | None,
        idx_k: Float[Array, "T 1 Di"] | None,
    ) -> Float[Array, "T Hq*D"]:
        num_tokens = q.shape[0]
        q, k, v = (x.reshape(self.sequences, self.length, *x.shape[1:]) for x in (q, k, v))
        if idx_q is None or (self.mode == "dense" and not self.index_loss):
            on_gpu = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16
            attended = jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation="cudnn" if on_gpu else "xla"
            )
            return attended.reshape(num_tokens, -1)
        idx_q = idx_q.reshape(self.sequences, self.length, *idx_q.shape[1:])
        idx_k = idx_k.reshape(self.sequences, self.length, idx_k.shape[-1])
        attended, losses = jax.vmap(self._attend_sequence)(q, k, v, idx_q, idx_k)
        if self.index_loss:
            self.index_losses.append(losses.mean())
        return attended.reshape(num_tokens, -1)

    def _attend_sequence(self, q, k, v, idx_q, idx_k):
        """One sequence: [L, Hq, D] attended values and the mean index loss."""
        starts = jnp.arange(0, self.length, self.chunk)
        pieces = (starts, *(x.reshape(-1, self.chunk, *x.shape[1:]) for x in (q, idx_q)))
        attend_chunk = functools.partial(self._attend_chunk, k=k, v=v, idx_k=idx_k)
        attended, losses = jax.lax.map(jax.checkpoint(attend_chunk), pieces)
        return attended.reshape(self.length, *attended.shape[2:]), losses.mean()

    def _attend_chunk(self, piece, *, k, v, idx_k):
        start, q, idx_q = piece
        c = self.config
        kv_heads, block = k.shape[1], c.index_block_size
        positions = start + jnp.arange(self.chunk)
        causal = jnp.arange(self.length) <= positions[:, None]  # [C, L]
        block_scores = self._block_scores(idx_q, idx_k, causal)  # [Hi, C, blocks], -inf where invisible
        member = self._selected(jax.lax.stop_gradient(block_scores))
        grouped = q.reshape(self.chunk, kv_heads, -1, c.head_dim)
        scores = jnp.einsum("chgd,lhd->hgcl", grouped, k, preferred_element_type=jnp.float32) * c.head_dim**-0.5
        mask = jnp.repeat(member, block, axis=-1)[:, None] & causal
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        attended = jnp.einsum("hgcl,lhd->chgd", weights.astype(v.dtype), v)
        loss = jnp.zeros(())
        if self.index_loss:
            share = jax.lax.stop_gradient(weights.mean(axis=1))
            share = share.reshape(kv_heads, self.chunk, -1, block).sum(axis=-1)  # [Hkv, C, blocks]
            logits = jnp.where(member, block_scores * c.index_head_dim**-0.5, -jnp.inf)
            log_index = jnp.where(member, jax.nn.log_softmax(logits, axis=-1), 0.0)
            loss = (jax.scipy.special.xlogy(share, share) - share * log_index).sum(axis=-1).mean()
        return attended.reshape(self.chunk, -1, c.head_dim), loss

    def _block_scores(self, idx_q, idx_k, causal):
        scores = jnp.einsum("chd,ld->hcl", idx_q, idx_k, preferred_element_type=jnp.float32)
        scores = jnp.where(causal, scores, -jnp.inf)
        return scores.reshape(*scores.shape[:2], -1, self.config.index_block_size).max(axis=-1)

    def _selected(self, block_scores):
        """Which blocks each query attends to, [Hi, C, blocks] bool."""
        if self.mode == "dense":
            return block_scores > -jnp.inf
        c, blocks = self.config, jnp.arange(block_scores.shape[-1])
        queries = jnp.array([0, block_scores.shape[1]], jnp.int32)
        batch = Batch(blocks[None], queries, jnp.array([self.length], jnp.int32))
        ids = select_blocks(
            block_scores,
            batch,
            topk=c.index_topk_blocks,
            init_blocks=c.index_init_blocks,
            local_blocks=c.index_local_blocks,
            impl="reference",
        )
        return (ids[..., None] == blocks).any(axis=-2)
