"""One measure of error for results in bfloat16: against float32, next to what plain jnp makes of the same rows.

An element's error is |found - truth| / (|truth| + std(truth)): relative where the truth is large, in the spread of the
results where it is near zero. The truth is the reference on rows and weights in float32. No absolute bound is right for
all sizes (the largest of 25 million errors is larger than that of a thousand), so a kernel is measured against the
bfloat16 reference, which rounds where it rounds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

RMS_FACTOR, MAX_FACTOR = 1.1, 2.0
ROUNDING = 2**-8  # one rounding to bfloat16, at most
RMS_FLOOR = ROUNDING / 16  # sums of few elements, where a 1.1 is noise


class DeviceErrors(NamedTuple):
    """Root mean square and maximum of the elements' errors, on the device; float32 scalars."""

    rms: Float[Array, ""]
    max: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of a kernel and of the reference, both in bfloat16, against the truth; infinite where something is no number."""

    rms: float
    max: float
    reference_rms: float
    reference_max: float

    @property
    def fine(self) -> bool:
        """Whether the kernel is as good as the reference."""
        return (
            self.rms <= RMS_FACTOR * self.reference_rms + RMS_FLOOR
            and self.max <= MAX_FACTOR * self.reference_max + ROUNDING
        )

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.3g} (reference {self.reference_rms:.3g}), "
            f"max {self.max:.3g} (reference {self.reference_max:.3g})"
        )


def device_errors(found: Any, truth: Any, live: Int[Array, ""] | int | None = None) -> DeviceErrors:
    """Errors of all arrays of a pytree together; each is measured in its own truth's spread. Traceable.

    Args:
      found: arrays [T, N].
      truth: the same, float32.
      live: rows that count, the first ones; all if None.
    """
    squares, count, most = jnp.float32(0), jnp.float32(0), jnp.float32(0)
    for ours, exact in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        counts = jnp.arange(exact.shape[0])[:, None] < (exact.shape[0] if live is None else live)
        counts = jnp.broadcast_to(counts, exact.shape)
        exact = exact.astype(jnp.float32)
        spread = jnp.std(exact, where=counts)
        error = jnp.abs(ours.astype(jnp.float32) - exact) / jnp.maximum(jnp.abs(exact) + spread, 1e-30)
        error = jnp.where(counts, error, 0)
        squares, count = squares + jnp.sum(error**2), count + jnp.sum(counts, dtype=jnp.float32)
        most = jnp.maximum(most, jnp.max(error, initial=0))
    return DeviceErrors(jnp.sqrt(squares / jnp.maximum(count, 1)), most)


def host_errors(found: DeviceErrors, reference: DeviceErrors) -> Errors:
    """Fetches both."""
    values = (float(value) for value in (*found, *reference))
    return Errors(*(value if math.isfinite(value) else math.inf for value in values))


def worst(errors: list[Errors]) -> Errors:
    """The one that is furthest beyond what is allowed, in shares of that."""
    return max(
        errors,
        key=lambda own: max(
            own.rms / (RMS_FACTOR * own.reference_rms + RMS_FLOOR),
            own.max / (MAX_FACTOR * own.reference_max + ROUNDING),
        ),
    )
