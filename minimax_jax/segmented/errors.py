"""What can go wrong at a boundary or with a captured call."""

from __future__ import annotations


class BoundaryError(RuntimeError):
    """A boundary's host function failed; the message names the boundary, its place and its call."""


class BoundaryResultError(BoundaryError, ValueError):
    """A boundary returned something else than it declared, or a second output buffer."""


class UnknownBoundaryError(BoundaryError, LookupError):
    """A function holds a boundary whose name nobody has registered."""


class StaleCaptureError(RuntimeError):
    """A captured call, or a runtime made for it, outlived the resources (the epoch) it was made with."""
