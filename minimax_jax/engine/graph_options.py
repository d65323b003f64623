"""Compiler options that put loops on a GPU into one CUDA graph (XLA's command buffer), where XLA takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

LOOPS_IN_GRAPHS: dict[str, Any] = {
    # XLA's own list, and WHILE
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE",
    # kernels that do not need each other's results run side by side: the shared expert's beside the router's
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    # one call that fits into no graph keeps the whole loop out, and sorts by the CUB library are such calls; XLA's own
    # kernels sort the little there is (beside log probabilities)
    "xla_gpu_enable_cub_radix_sort": False,
}


class GraphedLoop:
    """A jitted function that holds a loop, compiled with the loop in a graph; without, if XLA or the driver refuse.

    Each shape is an executable of its own, so any call may be the first that is refused; none is put in a graph then
    any more.

    Attributes:
      refusal: why loops are in no graphs, None while they are.
    """

    def __init__(self, make: Callable[[dict[str, Any] | None], Any], *, graphs: bool):
        """
        Args:
          make: jits the function with given compiler options.
          graphs: whether to try.
        """
        self._make = make
        self._run = make(LOOPS_IN_GRAPHS if graphs else None)
        self.refusal: str | None = None if graphs else "not asked for"

    def lower(self, *args: Any, **static: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s."""
        return self._run.lower(*args, **static)

    def __call__(self, donated: Any, *args: Any, **static: Any) -> Any:
        """Runs it; `donated` is its first argument.

        Raises:
          jax.errors.JaxRuntimeError: as the function without graphs.
        """
        try:
            return self._run(donated, *args, **static)
        except jax.errors.JaxRuntimeError as error:
            taken = any(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
            # what failed for want of memory, or once it ran, would fail in any form
            if self.refusal is not None or taken or "RESOURCE_EXHAUSTED" in str(error):
                raise
            refusal = str(error).splitlines()[0]
        plain = self._make(None)
        result = plain(donated, *args, **static)  # where this fails too, it was not for the graph, which stays
        self._run, self.refusal = plain, refusal
        return result
