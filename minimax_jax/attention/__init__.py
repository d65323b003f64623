"""What runs where attention meets its context."""

from minimax_jax.attention.reference import ReferenceAttend
from minimax_jax.attention.traced import TracedAttend

__all__ = ["ReferenceAttend", "TracedAttend"]
