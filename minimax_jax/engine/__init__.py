"""The engine: requests, scheduling, steps over paged caches, sampling."""

from minimax_jax.engine.engine_config import CacheConfig, DecodeConfig, SegmentConfig
from minimax_jax.engine.generation_config import GenerationConfig
from minimax_jax.engine.sampling_params import SamplingParams

__all__ = ["CacheConfig", "DecodeConfig", "GenerationConfig", "SamplingParams", "SegmentConfig"]
