"""Attention and matmul operations for MiniMax-M3; knows nothing of the model or the engine.

Shapes: T tokens, R requests, P pages, N pages per request (padded), Hq/Hkv/Hi query/KV/index heads,
D channels, B tokens a page, E experts. Every operation takes `impl=None | "reference" | ...`.
"""

from minimax_kernels.add_norm.api import add_norm
from minimax_kernels.add_norm.reference import rms_norm
from minimax_kernels.batch import Batch, packed_batch
from minimax_kernels.cache_types import FP8
from minimax_kernels.choose_experts.api import choose_experts
from minimax_kernels.dense_attention.api import dense_attention
from minimax_kernels.grouped_matmul.api import grouped_matmul
from minimax_kernels.index_score.api import index_score
from minimax_kernels.likeliest import likeliest
from minimax_kernels.matmul.api import matmul
from minimax_kernels.msa.api import msa
from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.norm_rope.api import norm_rope
from minimax_kernels.project_norm_rope.api import project_norm_rope
from minimax_kernels.route_tokens.api import route_tokens
from minimax_kernels.routed_experts.api import routed_experts
from minimax_kernels.sampling_cut.api import sampling_cut
from minimax_kernels.select_blocks.api import select_blocks
from minimax_kernels.sparse_attention.api import sparse_attention
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.write_index.api import write_index
from minimax_kernels.write_kv.api import write_kv
from minimax_kernels.write_kv_index.api import write_kv_index

__all__ = [
    "FP8",
    "Batch",
    "Mxfp8",
    "Swiglu",
    "add_norm",
    "choose_experts",
    "dense_attention",
    "grouped_matmul",
    "index_score",
    "likeliest",
    "matmul",
    "msa",
    "norm_rope",
    "packed_batch",
    "project_norm_rope",
    "rms_norm",
    "route_tokens",
    "routed_experts",
    "sampling_cut",
    "select_blocks",
    "sparse_attention",
    "write_index",
    "write_kv",
    "write_kv_index",
]
