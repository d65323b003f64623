"""Chooses which implementation of an operation serves a call."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from minimax_kernels.mosaic_support import require_mosaic_gpu

Implementation = Callable[..., Any]


def implementations(
    pallas_triton: Implementation, reference: Implementation, pallas_mosaic_gpu: Implementation | None = None
) -> dict[str, Implementation]:
    """The names of an operation's implementations; Pallas kernels also take `interpret=`.

    Args:
      pallas_mosaic_gpu: of `mosaic_gpu`.
    """
    kernels = {"pallas_triton": pallas_triton}
    if pallas_mosaic_gpu is not None:
        kernels["pallas_mosaic_gpu"] = pallas_mosaic_gpu
    interpreted = {f"{name}_interpret": functools.partial(kernel, interpret=True) for name, kernel in kernels.items()}
    return {**kernels, **interpreted, "reference": reference}


def mosaic_gpu(op: str) -> Implementation:
    """An operation's `pallas_mosaic_gpu`, imported when it is called: not every version of JAX could import it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        require_mosaic_gpu()
        module = importlib.import_module(f"minimax_kernels.{op}.pallas_mosaic_gpu")
        return getattr(module, op)(*args, **kwargs)

    return call


def dispatch(
    op: str,
    implementations: Mapping[str, Implementation],
    impl: str | None,
    *args: Any,
    differentiable: bool = False,
    best: tuple[str, ...] = ("pallas_triton",),
    **kwargs: Any,
):
    """Calls implementation `impl` of an operation, or with None the best for the device that the call runs on.

    None means the first of `best` on NVIDIA GPUs that can serve the call, and `reference` everywhere else.

    Args:
      op: the operation's name, for messages.
      implementations: name -> function; "reference" always serves. "pallas_triton_interpret" is for tests.
      impl: one of the names, or None.
      best: names, the fastest first.
      differentiable: derivatives are the reference's, whichever implementation is picked; one that is named has none.

    Raises:
      ValueError: for an unknown name.
      NotImplementedError: from a named implementation that cannot serve these arguments.
    """
    if impl is not None:
        if impl not in implementations:
            raise ValueError(
                f"impl = {impl!r}: {op} has {', '.join(map(repr, implementations))} (or None for the best)"
            )
        return implementations[impl](*args, **kwargs)
    reference = implementations["reference"]
    if jax.default_backend() != "gpu":
        return reference(*args, **kwargs)
    # `out` is the one keyword of an operation that is an array
    arrays = {name: value for name, value in kwargs.items() if name == "out" and value is not None}
    static = {name: value for name, value in kwargs.items() if name not in arrays}
    refusal = None
    for name in best:
        if name not in implementations:
            continue
        call = _compiled(op, implementations[name], reference, tuple(static.items()), differentiable)
        try:  # tracing shows a refusal without launching anything, and the call uses the trace
            _require_device(name, args)
            call.eval_shape(args, arrays)
        except NotImplementedError as error:
            refusal = str(error)  # not the error: its traceback would keep this frame, and the arrays, alive
        else:
            return call(args, arrays)
    if refusal is not None:
        warnings.warn(f"{op} falls back to 'reference' ({refusal})", stacklevel=3)
    return reference(*args, **kwargs)


def _by_platform(
    best: Implementation, reference: Implementation, options: tuple[tuple[str, Any], ...], differentiable: bool
) -> Callable[..., Any]:
    """Chooses when the call is lowered, so that arrays on the CPU of a machine with a GPU are served too."""
    static = dict(options)
    best = _with_gradient_of(reference, best, static) if differentiable else best

    def call(function: Implementation) -> Callable[..., Any]:
        return lambda args, arrays: function(*args, **static, **arrays)

    def run(args: tuple[Any, ...], arrays: dict[str, Any]) -> Any:
        return jax.lax.platform_dependent(args, arrays, cuda=call(best), default=call(reference))

    return run


@functools.lru_cache(maxsize=256)
def _compiled(op: str, *key: Any) -> Any:
    """A jitted function, also for calls inside a trace: sixty equal layers are traced and lowered once.

    Outside a trace it compiles for where the arrays are, while JAX would ask about its default device.
    """
    function = _by_platform(*key)
    function.__name__ = function.__qualname__ = op  # in the names of a program's operations
    return jax.jit(function)


def _require_device(name: str, args: tuple[Any, ...]) -> None:
    """8-bit numbers are multiplied by what Hopper and later have: bfloat16 arithmetic in pairs, conversions of e4m3.

    Matrix instructions of kernels on Mosaic GPU are Hopper's own.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if name == "pallas_mosaic_gpu" and (capability is None or int(float(capability)) != 9):
        raise NotImplementedError(f"pallas_mosaic_gpu: needs compute capability 9, this is {capability}")
    if not any(getattr(leaf, "dtype", None) == jnp.float8_e4m3fn for leaf in jax.tree.leaves(args)):
        return
    if capability is not None and float(capability) < 9.0:
        raise NotImplementedError(f"pallas_triton: 8-bit operands need compute capability 9.0, this is {capability}")


def _with_gradient_of(reference: Implementation, best: Implementation, static: Mapping[str, Any]) -> Implementation:
    """`best`, which is opaque to differentiation, with the derivative of `reference`."""

    @jax.custom_jvp
    def call(*args: Any) -> Any:
        return best(*args, **static)

    @call.defjvp
    def _derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        return jax.jvp(functools.partial(reference, **static), primals, tangents)

    return lambda *args, **_: call(*args)
