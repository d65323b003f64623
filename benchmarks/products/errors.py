"""How far a bfloat16 result is from the truth, and whether that is no more than bfloat16 itself costs.

The truth is the reference in float32, on upcast rows and dequantised weights. An element's error counts in its own size
plus the spread of all, so that neither large sums nor cancelled ones decide alone. What is judged may be a little worse
than the reference in bfloat16, whose sums have another order, and may round once more than it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels import Mxfp8

RMS_FACTOR, LARGEST_FACTOR = 1.1, 2.0  # of the reference's errors
ROUNDING = 2**-8  # the most that one rounding to bfloat16 moves a number, in its own size
STRICT = {"xla_allow_excess_precision": False}  # XLA may leave out roundings to bfloat16 between float32 operations


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of all elements, each |found - truth| / (|truth| + std(truth)).

    Attributes:
      rms: root of the mean square.
      largest: infinite where a number was expected and none found.
      rounding: root mean square of what rounding the truth once to bfloat16 costs.
    """

    rms: float
    largest: float
    rounding: float

    def excess(self, reference: Errors) -> str:
        """What is worse than the reference allows; empty if nothing is."""
        # roundings are independent, hence squares add up
        rms = math.hypot(RMS_FACTOR * reference.rms, self.rounding)
        largest = LARGEST_FACTOR * reference.largest + ROUNDING
        if self.rms <= rms and self.largest <= largest:
            return ""
        return f"rms {self.rms:.3g} of at most {rms:.3g}, largest {self.largest:.3g} of at most {largest:.3g}"


def measure_errors(found: Any, truth: Any, live: int | None = None) -> Errors:
    """Errors of arrays of the same shapes, the worst of each kind.

    Args:
      found: an array, or a tuple of them, [rows, ...].
      truth: the same in float32.
      live: rows to compare, from the first on; all if None.
    """
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True))
    measured = [_measure(ours, wide, len(ours) if live is None else live) for ours, wide in pairs]
    rms, largest, rounding = (max(float(values[i]) for values in measured) for i in range(3))
    return Errors(rms, largest, rounding)


def upcast(values: Any) -> Any:
    """bfloat16 arrays of a pytree in float32; `Mxfp8` stays: references dequantise it to the type of the rows."""
    return jax.tree.map(
        lambda x: x if isinstance(x, Mxfp8) or x.dtype != jnp.bfloat16 else x.astype(jnp.float32),
        values,
        is_leaf=lambda x: isinstance(x, Mxfp8),
    )


def reference_and_truth(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(the reference with all of its roundings, the same in float32), compiled at the first call."""
    return (
        jax.jit(function, compiler_options=STRICT),
        jax.jit(lambda *args: function(*upcast(args)), compiler_options=STRICT),
    )


@jax.jit
def _measure(
    found: Float[Array, "T ..."], truth: Float[Array, "T ..."], live: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    rows = (jnp.arange(truth.shape[0]) < live).reshape(-1, *[1] * (truth.ndim - 1))
    count = jnp.maximum(live * (truth.size // truth.shape[0]), 1)
    truth = jnp.where(rows, truth, 0)
    mean = truth.sum() / count
    scale = jnp.sqrt(jnp.where(rows, jnp.square(truth - mean), 0).sum() / count)
    scale = jnp.abs(truth) + jnp.maximum(scale, 1e-6)

    def relative(values: jax.Array) -> jax.Array:
        error = jnp.where(rows, jnp.abs(values - truth) / scale, 0)
        return jnp.where(jnp.isfinite(error), error, jnp.inf)

    error = relative(found.astype(jnp.float32))
    rounded = relative(jax.lax.reduce_precision(truth, 8, 7))
    rms, rounding = (jnp.sqrt(jnp.square(values).sum() / count) for values in (error, rounded))
    return rms, error.max(initial=0), rounding
