"""segmented_jit: compiled segments around host functions, captured and replayed.

Knows nothing of any model. Import `boundary` to register a host function, `segmented_jit` to compile around it.
"""

from minimax_jax.segmented.boundary import Boundary, BoundaryCall, boundary, get_boundary, unregister_boundary
from minimax_jax.segmented.epoch import Epoch
from minimax_jax.segmented.errors import BoundaryError, BoundaryResultError, StaleCaptureError, UnknownBoundaryError
from minimax_jax.segmented.function import SegmentedFunction, segmented_jit
from minimax_jax.segmented.stats import Stats

__all__ = [
    "Boundary",
    "BoundaryCall",
    "BoundaryError",
    "BoundaryResultError",
    "Epoch",
    "SegmentedFunction",
    "StaleCaptureError",
    "Stats",
    "UnknownBoundaryError",
    "boundary",
    "get_boundary",
    "segmented_jit",
    "unregister_boundary",
]
