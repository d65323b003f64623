"""The attention boundary: dense and sparse layers through one host function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minimax_jax.attention.runtime import StepRuntime
from minimax_jax.segmented import BoundaryCall, boundary

ATTENTION = "minimax_m3_attention"


def _attended(q: Any, k: Any, v: Any, idx_q: Any, idx_k: Any, out: Any, *, layer: int) -> jax.ShapeDtypeStruct:
    """The result is [T, Hq*D] in the activations' type, and the output buffer must be just that."""
    return jax.ShapeDtypeStruct((q.shape[0], q.shape[1] * q.shape[2]), q.dtype)


@boundary(ATTENTION, abstract=_attended, output=5)
def attention_boundary(
    call: BoundaryCall,
    q: Float[Array, "T Hq D"],
    k: Float[Array, "T Hkv D"],
    v: Float[Array, "T Hkv D"],
    idx_q: Float[Array, "T Hi Di"] | None,
    idx_k: Float[Array, "T 1 Di"] | None,
    out: Float[Array, "T Hq*D"],
    *,
    layer: int,
) -> Float[Array, "T Hq*D"]:
    """Writes the step's keys and values to the pools in `call.runtime` and attends; caches are no operands.

    Only the live rows, which the runtime's batch knows, are read and written. Over ranks, every operand is
    [ranks, *shape on one rank]; data ranks may have fewer live rows than the call.
    """
    runtime = call.runtime
    if not isinstance(runtime, StepRuntime):
        raise TypeError(f"runtime is {type(runtime).__name__}: must be a StepRuntime (`PagedAttention.step`)")
    tokens = runtime.num_tokens
    if call.size is not None and tokens != call.live:
        raise ValueError(f"runtime has {tokens} tokens: must be {call.live}, as the call")
    if call.live is not None and tokens > call.live:  # under plain jax.jit the caller may have padded
        raise ValueError(f"runtime has {tokens} tokens: must be at most {call.live}, the call's")
    return runtime.attention.attend(runtime, layer, q, k, v, idx_q, idx_k, out, exact=call.size == "exact")


class BoundaryAttend:
    """`attend` that binds the attention boundary.

    Args:
      runtime: None under `segmented_jit`, whose calls bring theirs; a step's own under plain `jax.jit`.
    """

    def __init__(self, runtime: StepRuntime | None = None):
        self._runtime = runtime

    def __call__(
        self,
        layer_id: int,
        q: Float[Array, "T Hq D"],
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        idx_q: Float[Array, "T Hi Di"] | None,
        idx_k: Float[Array, "T 1 Di"] | None,
    ) -> Float[Array, "T Hq*D"]:
        # allocated by the segment before, so that attention has no memory of its own
        out = jnp.zeros((q.shape[0], q.shape[1] * q.shape[2]), q.dtype)
        return attention_boundary(q, k, v, idx_q, idx_k, out, layer=layer_id, runtime=self._runtime)
