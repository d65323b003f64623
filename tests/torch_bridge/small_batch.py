"""One small ragged batch over pages, as torch tensors and as the same arrays of JAX."""

from __future__ import annotations

import jax.numpy as jnp
import torch

from minimax_kernels import Batch

NUM_PAGES, KV_HEADS, BLOCK, HEAD_DIM, INDEX_DIM, NUM_TOKENS = 6, 2, 16, 32, 16, 9
SCALE, TOPK = 0.2, 2
SELECTION = {"topk": TOPK, "init_blocks": 0, "local_blocks": 1}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The operands of every operation, by name; the last row of the tokens is padding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "q": normal(NUM_TOKENS, 4, HEAD_DIM),
        "k_cache": normal(NUM_PAGES, KV_HEADS, BLOCK, HEAD_DIM),
        "v_cache": normal(NUM_PAGES, KV_HEADS, BLOCK, HEAD_DIM),
        "idx_q": normal(NUM_TOKENS, KV_HEADS, INDEX_DIM),
        "index_cache": normal(NUM_PAGES, BLOCK, INDEX_DIM),
        "scores": normal(KV_HEADS, NUM_TOKENS, 3).float(),
        "selected": torch.tensor([[1, 0], [0, -1]], dtype=torch.int32)[:, None].repeat(1, NUM_TOKENS, 1),
        "block_tables": torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32),
        "query_starts": torch.tensor([0, 5, 8], dtype=torch.int32),
        "kv_lens": torch.tensor([40, 30], dtype=torch.int32),
    }


def batch_of(given: dict) -> Batch:
    return Batch(given["block_tables"], given["query_starts"], given["kv_lens"])


def arrays(given: dict[str, torch.Tensor]) -> dict:
    """Copies in JAX."""
    return {name: jnp.array(tensor.float().numpy()).astype(_dtype(tensor)) for name, tensor in given.items()}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# operation -> (operands, options)
OPERATIONS = {
    "index_score": (("idx_q", "index_cache"), {}),
    "select_blocks": (("scores",), SELECTION),
    "dense_attention": (("q", "k_cache", "v_cache"), {"scale": SCALE}),
    "sparse_attention": (("q", "k_cache", "v_cache", "selected"), {"scale": SCALE}),
    "msa": (("q", "k_cache", "v_cache", "idx_q", "index_cache"), {"scale": SCALE, **SELECTION}),
}
WITH_OUT = ("dense_attention", "sparse_attention", "msa")
