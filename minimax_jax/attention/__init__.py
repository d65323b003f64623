"""What runs where attention meets its context."""

from minimax_jax.attention.boundary import ATTENTION, BoundaryAttend
from minimax_jax.attention.layout import StepLayout, check_pages, step_layout
from minimax_jax.attention.reference import ReferenceAttend
from minimax_jax.attention.runtime import PagedAttention, StepRuntime
from minimax_jax.attention.traced import TracedAttend
from minimax_jax.attention.transfer import send_together

__all__ = [
    "ATTENTION",
    "BoundaryAttend",
    "PagedAttention",
    "ReferenceAttend",
    "StepLayout",
    "StepRuntime",
    "TracedAttend",
    "check_pages",
    "send_together",
    "step_layout",
]
