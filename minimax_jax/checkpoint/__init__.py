"""Checkpoints: safetensors reading and writing, the name styles, MXFP8, verified streaming loads."""

from minimax_jax.checkpoint.check import CheckReport, NonFinite, check_checkpoint
from minimax_jax.checkpoint.errors import CheckpointError
from minimax_jax.checkpoint.files import CheckpointFiles
from minimax_jax.checkpoint.load import LoadPlan, load_state, plan_load
from minimax_jax.checkpoint.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from minimax_jax.checkpoint.names import STYLES, Piece, Read, StateTensor, Style, detect_style, state_tensors
from minimax_jax.checkpoint.safetensors_reader import SafetensorsFile
from minimax_jax.checkpoint.save import save_state

__all__ = [
    "STYLES",
    "CheckReport",
    "CheckpointError",
    "CheckpointFiles",
    "LoadPlan",
    "NonFinite",
    "Piece",
    "Read",
    "SafetensorsFile",
    "StateTensor",
    "Style",
    "check_checkpoint",
    "dequantize_mxfp8",
    "detect_style",
    "load_state",
    "plan_load",
    "quantize_mxfp8",
    "save_state",
    "state_tensors",
]
