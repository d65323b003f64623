"""The model and its attention operations on torch tensors, and the way into transformers' own model.

Importing it needs torch (`pip install 'minimax-jax[torch]'`); the rest of `minimax_jax` never imports it.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("minimax_jax.torch needs torch: pip install 'minimax-jax[torch]'") from error

from minimax_jax.torch.cache_writes import write_index, write_kv
from minimax_jax.torch.causal_lm import MiniMaxM3ForCausalLM
from minimax_jax.torch.ops import dense_attention, index_score, msa, select_blocks, sparse_attention
from minimax_jax.torch.tensors import to_jax, to_torch
from minimax_jax.torch.transformers_attention import patch_transformers, register_attention
from minimax_kernels import Batch

__all__ = [
    "Batch",
    "MiniMaxM3ForCausalLM",
    "dense_attention",
    "index_score",
    "msa",
    "patch_transformers",
    "register_attention",
    "select_blocks",
    "sparse_attention",
    "to_jax",
    "to_torch",
    "write_index",
    "write_kv",
]
