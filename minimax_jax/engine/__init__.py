"""Generation over paged caches."""

from minimax_jax.engine.generation_config import GenerationConfig

__all__ = ["GenerationConfig"]
