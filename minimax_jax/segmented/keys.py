"""When two segments are the same: a key over everything that decides what XLA compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from minimax_jax.segmented.jaxprs import compiled_params, is_literal

_LARGEST_CONSTANT = 4096  # bytes of an array that is compared by value


class _Same:
    """Stands for one object, which it keeps alive so that no other can take its identity."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _name(item: tuple[Any, Any]) -> str:
    return str(item[0])


class Keys:
    """Keys of the segments of one split.

    Remembers what it has seen and keeps it alive: layers share the bodies of their nested calls, whose identity stands
    for them only as long as they live.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, Hashable]] = {}
        self._types: dict[Any, str] = {}

    def equations(self, eqns: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]) -> Hashable:
        """Equal for equal equations, whatever their variables are called.

        Parameters are compared by value as far as that is certain, else by identity: a key may tell apart what is the
        same (which costs a compilation), never the other way round.
        """
        return self.jaxpr(eqns, (), invars, outvars)

    def jaxpr(
        self, eqns: Sequence[Any], constvars: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]
    ) -> Hashable:
        numbers: dict[Any, int] = {}
        for var in (*constvars, *invars):
            numbers[var] = len(numbers)

        def atom(x: Any) -> Hashable:
            if is_literal(x):
                value = np.asarray(x.val)
                return (self._type(x.aval), str(value.dtype), value.shape, value.tobytes())
            return numbers[x]

        inputs = tuple(self._type(var.aval) for var in (*constvars, *invars))
        body = []
        for eqn in eqns:
            operands = tuple(atom(x) for x in eqn.invars)
            for var in eqn.outvars:
                numbers[var] = len(numbers)
            results = tuple(self._type(var.aval) for var in eqn.outvars)
            context = self._remember(eqn.ctx, repr)
            body.append((eqn.primitive, self.value(compiled_params(eqn)), operands, results, context))
        return (len(constvars), inputs, tuple(body), tuple(atom(x) for x in outvars))

    def value(self, x: Any) -> Hashable:
        if isinstance(x, (jex.Jaxpr, jex.ClosedJaxpr)):
            return self._remember(x, self._closed)
        if isinstance(x, (tuple, list)):
            return (type(x), tuple(self.value(item) for item in x))
        if isinstance(x, dict):
            return (dict, tuple((str(key), self.value(item)) for key, item in sorted(x.items(), key=_name)))
        if isinstance(x, (np.ndarray, np.generic)) and x.nbytes <= _LARGEST_CONSTANT:
            return (str(x.dtype), x.shape, x.tobytes())
        if isinstance(x, (float, complex)):
            return (type(x), repr(x))  # tells 0.0 from -0.0
        if isinstance(x, (np.ndarray, jax.Array)):
            return _Same(x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return (type(x), tuple(self.value(getattr(x, field.name)) for field in dataclasses.fields(x)))
        try:
            hash(x)
        except TypeError:
            return _Same(x)
        return (type(x), x)  # with its type, for 1 == True

    def _closed(self, x: Any) -> Hashable:
        inner = getattr(x, "jaxpr", x)
        key = self.jaxpr(inner.eqns, inner.constvars, inner.invars, inner.outvars)
        return (key, tuple(self.value(const) for const in getattr(x, "consts", ())))

    def _type(self, aval: Any) -> str:
        text = self._types.get(aval)
        if text is None:
            text = self._types[aval] = str(aval)
        return text

    def _remember(self, x: Any, make: Any) -> Hashable:
        seen = self._seen.get(id(x))
        if seen is None:
            seen = self._seen[id(x)] = (x, make(x))
        return seen[1]
