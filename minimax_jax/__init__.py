"""MiniMax-M3 in JAX: Flax NNX modules, paged sparse attention, a PyTorch-style API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "GenerationConfig",
    "MiniMaxM3Config",
    "MiniMaxM3ForCausalLM",
    "SamplingParams",
    "Tokenizer",
    "__version__",
]

if TYPE_CHECKING:
    from minimax_jax.causal_lm import MiniMaxM3ForCausalLM
    from minimax_jax.config import MiniMaxM3Config
    from minimax_jax.engine import GenerationConfig, SamplingParams
    from minimax_jax.llm import LLM
    from minimax_jax.tokenizer import Tokenizer

_HOMES = {
    "GenerationConfig": "minimax_jax.engine",
    "LLM": "minimax_jax.llm",
    "MiniMaxM3Config": "minimax_jax.config",
    "MiniMaxM3ForCausalLM": "minimax_jax.causal_lm",
    "SamplingParams": "minimax_jax.engine",
    "Tokenizer": "minimax_jax.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Loads the public names when they are first used: `minimax-jax --help` need not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minimax_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
