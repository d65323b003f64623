"""Boundaries: host functions that stand between the compiled segments of a function.

A boundary is one equation of `boundary_p` in a jaxpr, under a registered name. `segmented_jit` splits there and calls
the host function between two executables; plain `jax.jit` lowers it to a host callback; `jax.grad` and `jax.vmap`
refuse.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.extend.core as jex
import numpy as np
from jax.experimental import io_callback
from jax.interpreters import ad, batching, mlir

from minimax_jax.segmented.errors import BoundaryError, BoundaryResultError, StaleCaptureError, UnknownBoundaryError


@dataclasses.dataclass(frozen=True)
class BoundaryCall:
    """What a host function is told about the call it serves, beside its operands.

    Attributes:
      name: the boundary's name.
      where: the place in words, for messages.
      live: rows that hold data; rows from here on are padding of the bucket, and nothing may be written to them.
        Outside of `segmented_jit` all rows of the first operand; None if that has no axis 0.
      mesh: under a mesh, its devices: operands and results are then [devices, *shape on one device].
      runtime: whatever the caller handed over for this call (plans, pools, Python state), or None.
      size: "bucket" if the rows are those of a bucket, "exact" if they are any number; None outside `segmented_jit`.
    """

    name: str
    where: str
    live: int | None
    runtime: Any
    mesh: jax.sharding.Mesh | None = None
    size: Literal["bucket", "exact"] | None = None

    def rows(self, x: Any) -> Any:
        """The live rows of an operand. On a device this compiles for every count: kernels rather take `live`."""
        return x if self.live is None or self.live == x.shape[0] else x[: self.live]


@dataclasses.dataclass(frozen=True)
class Boundary:
    """A registered host function; calling it binds the boundary into the function that is being traced.

    Attributes:
      name: what the registry and messages call it.
      call: `call(BoundaryCall, *operands, **static)` -> results as `abstract` says. Its results may be donated to the
        next segment: it must not keep them, nor return arrays that others hold.
      abstract: `abstract(*operands, **static)` on shapes and dtypes -> `jax.ShapeDtypeStruct`s in any pytree.
      mutates: numbers of the operands whose buffers the host function consumes (donates to its kernels).
      output: number of the operand that is the output buffer: the segment before allocates it, the host function
        writes into it and returns it. Consumed as well.
    """

    name: str
    call: Callable[..., Any] = dataclasses.field(compare=False)
    abstract: Callable[..., Any] = dataclasses.field(compare=False)
    mutates: tuple[int, ...] = ()
    output: int | None = None

    @property
    def consumed(self) -> frozenset[int]:
        """Numbers of all operands that are gone after a call."""
        return frozenset(self.mutates) | ({self.output} if self.output is not None else set())

    def __call__(self, *operands: Any, runtime: Any = None, **static: Hashable) -> Any:
        """Binds the boundary to operands (pytrees of arrays) and static values, which messages show.

        Args:
          runtime: for calls outside of `segmented_jit`: what `BoundaryCall.runtime` shall be. It becomes part of the
            trace, so another runtime traces again.

        Raises:
          BoundaryResultError: if `abstract` declares what has no shape and dtype, or the output buffer's differ from
            the declared result's.
          Exception: as `abstract` raised it, with boundary and static values as a note.
        """
        shapes = jax.eval_shape(lambda *xs: xs, *operands)
        call = describe(self.name, tuple(sorted(static.items())))
        try:
            declared = self.abstract(*shapes, **static)
        except Exception as error:
            error.add_note(f"boundary {call}: in its abstract function")
            raise
        results, out_tree = jax.tree.flatten(declared)
        for result in results:
            if not (hasattr(result, "shape") and hasattr(result, "dtype")):
                raise BoundaryResultError(
                    f"boundary {call}: its abstract function declares {type(result).__name__}: must be "
                    "jax.ShapeDtypeStruct"
                )
        if self.output is not None:
            self._check_output(call, shapes[self.output], results)
        leaves, in_tree = jax.tree.flatten(operands)
        bound = boundary_p.bind(
            *leaves,
            name=self.name,
            static=tuple(sorted(static.items())),
            in_tree=in_tree,
            out_tree=out_tree,
            results=tuple((tuple(r.shape), np.dtype(r.dtype)) for r in results),
            runtime=runtime,
        )
        return jax.tree.unflatten(out_tree, bound)

    def _check_output(self, call: str, buffer: Any, results: list[Any]) -> None:
        if len(results) != 1 or not hasattr(buffer, "shape"):
            raise BoundaryResultError(
                f"boundary {call}: with an output buffer there must be one result and one buffer, "
                f"found {len(results)} results"
            )
        if tuple(buffer.shape) != tuple(results[0].shape):
            raise BoundaryResultError(
                f"boundary {call}: output buffer has shape {tuple(buffer.shape)}: must be {tuple(results[0].shape)}"
            )
        if buffer.dtype != results[0].dtype:
            raise BoundaryResultError(
                f"boundary {call}: output buffer is {buffer.dtype}: must be {np.dtype(results[0].dtype)}"
            )


_REGISTRY: dict[str, Boundary] = {}
_REGISTRY_LOCK = threading.Lock()


def boundary(
    name: str,
    *,
    abstract: Callable[..., Any] | None = None,
    mutates: Sequence[int] = (),
    output: int | None = None,
    replace: bool = False,
) -> Callable[[Callable[..., Any]], Boundary]:
    """Registers a host function as the boundary `name`: `@boundary("attend", output=3)`.

    Args:
      abstract, mutates, output: as in `Boundary`. Without `abstract` the result is as the output buffer.
      replace: whether a boundary of this name may be there already.

    Raises:
      ValueError: for a name that is taken, or with neither `abstract` nor `output`.
    """
    if abstract is None:
        if output is None:
            raise ValueError(f"boundary {name!r}: give abstract or output; without them the result's shape is unknown")
        number = output

        def abstract(*operands: Any, **_: Hashable) -> Any:
            return operands[number]

    def register(call: Callable[..., Any]) -> Boundary:
        registered = Boundary(name, call, abstract, tuple(mutates), output)
        with _REGISTRY_LOCK:
            if name in _REGISTRY and not replace:
                raise ValueError(f"boundary {name!r} is registered already: choose another name, or pass replace=True")
            _REGISTRY[name] = registered
        return registered

    return register


def get_boundary(name: str) -> Boundary | None:
    """The boundary of this name; None if nobody has registered one."""
    return _REGISTRY.get(name)


def unregister_boundary(name: str) -> None:
    """Forgets a boundary; no error if there is none."""
    with _REGISTRY_LOCK:
        _REGISTRY.pop(name, None)


def describe(name: str, static: tuple[tuple[str, Hashable], ...]) -> str:
    """A boundary and its static values in words: 'attend'(layer=3)."""
    inner = ", ".join(f"{key}={value}" for key, value in static)
    return f"{name!r}({inner})" if inner else repr(name)


def call_host(call: BoundaryCall, params: dict[str, Any], operands: Sequence[Any]) -> list[Any]:
    """Runs a boundary's host function and checks what it returns.

    Args:
      params: of the boundary's equation.
      operands: its leaves, ready to be consumed where the boundary consumes.

    Raises:
      UnknownBoundaryError, BoundaryResultError, BoundaryError: naming boundary, static values and place.
      StaleCaptureError, jax.errors.JaxRuntimeError: as the host function raised them.
    """
    name = params["name"]
    where = f"boundary {describe(name, params['static'])} {call.where}"
    found = get_boundary(name)
    if found is None:
        raise UnknownBoundaryError(f"{where}: no boundary of this name is registered")
    arguments = jax.tree.unflatten(params["in_tree"], operands)
    try:
        returned = found.call(call, *arguments, **dict(params["static"]))
    except (StaleCaptureError, jax.errors.JaxRuntimeError) as error:
        error.add_note(where)
        raise
    except Exception as error:
        raise BoundaryError(f"{where}: {type(error).__name__}: {error}") from error
    results, tree = jax.tree.flatten(returned)
    if tree != params["out_tree"]:
        raise BoundaryResultError(f"{where}: returned {tree}: must be {params['out_tree']}")
    for number, (result, (shape, dtype)) in enumerate(zip(results, params["results"], strict=True)):
        label = f"result {number}" if len(results) > 1 else "result"
        if np.shape(result) != shape:
            raise BoundaryResultError(f"{where}: {label} has shape {np.shape(result)}: must be {shape}")
        if getattr(result, "dtype", None) != dtype:
            raise BoundaryResultError(f"{where}: {label} is {getattr(result, 'dtype', type(result))}: must be {dtype}")
    if found.output is not None:
        buffer = arguments[found.output]
        if results[0] is not buffer and not buffer.is_deleted():
            raise BoundaryResultError(
                f"{where}: two output buffers: the one it was given is unused, and it returned another; write into "
                "the given one (donate it) and return that"
            )
    return results


@functools.cache
def _bind_effects() -> Any:
    """The effect of an ordered host callback: keeps boundaries in order, and from being removed as dead code."""
    return jax.make_jaxpr(lambda: io_callback(lambda: None, None, ordered=True))().effects


def _abstract_eval(*_: Any, results: tuple[Any, ...], **__: Any) -> tuple[list[Any], Any]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in results], _bind_effects()


def _call_directly(*operands: Any, **params: Any) -> list[Any]:
    """A boundary outside of any trace: its consumed operands are copied, since callers still hold theirs."""
    found = get_boundary(params["name"])
    consumed = consumed_leaves(found, params["in_tree"]) if found else ()
    own = [jax.numpy.array(x, copy=True) if i in consumed else x for i, x in enumerate(operands)]
    call = BoundaryCall(params["name"], "called directly", _all_rows(operands), params["runtime"])
    return call_host(call, params, own)


def _all_rows(operands: Sequence[Any]) -> int | None:
    return operands[0].shape[0] if operands and np.ndim(operands[0]) else None


def _as_callback(*operands: Any, **params: Any) -> list[Any]:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in params["results"]]

    def host(*arrays: Any) -> list[np.ndarray]:
        own = [jax.numpy.array(x, copy=True) for x in arrays]  # what a callback is given is read-only
        call = BoundaryCall(params["name"], "in a host callback of jax.jit", _all_rows(own), params["runtime"])
        return [np.asarray(result) for result in call_host(call, params, own)]

    return io_callback(host, shapes, *operands, ordered=True)


def consumed_leaves(found: Boundary, in_tree: Any) -> frozenset[int]:
    """Numbers of the operand leaves that a boundary consumes."""
    leaves: set[int] = set()
    first = 0
    for number, subtree in enumerate(in_tree.children()):
        if number in found.consumed:
            leaves.update(range(first, first + subtree.num_leaves))
        first += subtree.num_leaves
    return frozenset(leaves)


def _refuse(what: str, instead: str, *_: Any, name: str, static: Any, **__: Any) -> Any:
    raise NotImplementedError(f"boundary {describe(name, static)} cannot be {what}: it is a host function; {instead}")


def _refuse_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    _refuse("differentiated (jax.grad, jax.jvp)", "train with a function that has no boundary", **params)


def _refuse_batching(args: Any, axes: Any, **params: Any) -> Any:
    _refuse("batched (jax.vmap)", "give it the whole batch as rows", **params)


boundary_p = jex.Primitive("segment_boundary")
boundary_p.multiple_results = True
boundary_p.def_effectful_abstract_eval(_abstract_eval)
boundary_p.def_impl(_call_directly)
mlir.register_lowering(boundary_p, mlir.lower_fun(_as_callback, multiple_results=True))
ad.primitive_jvps[boundary_p] = _refuse_jvp
batching.primitive_batchers[boundary_p] = _refuse_batching
