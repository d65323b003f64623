"""Flax NNX modules of MiniMax-M3: maths only, no cache, no host state, no device choice."""

from minimax_jax.model.comm import SINGLE_DEVICE, Comm
from minimax_jax.model.minimax_m3 import MiniMaxM3, abstract_model, merge_model, split_model
from minimax_jax.model.record import ForwardRecord

__all__ = ["SINGLE_DEVICE", "Comm", "ForwardRecord", "MiniMaxM3", "abstract_model", "merge_model", "split_model"]
