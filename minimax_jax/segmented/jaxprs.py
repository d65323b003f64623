"""Jaxprs as this package uses them: the one place that knows how JAX's versions differ."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from minimax_jax.segmented.boundary import boundary_p, describe

Atom = jex.Var | jex.Literal
# Calls whose body may be written out in place. Derivative rules are dropped: segments are never differentiated.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
}
_ALWAYS_INLINE = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")  # would hold functions of one trace


@dataclasses.dataclass(frozen=True)
class Traced:
    """A flat function as equations.

    Attributes:
      eqns: boundaries stand at the top level.
      invars: one for each argument; constvars: one for each of `consts`; outvars: variables or literals.
      source: the jaxpr, for `sub_jaxpr`.
    """

    eqns: tuple[jex.JaxprEqn, ...]
    invars: tuple[jex.Var, ...]
    constvars: tuple[jex.Var, ...]
    consts: tuple[Any, ...]
    outvars: tuple[Atom, ...]
    source: Any


def trace(
    fn: Callable[..., Sequence[Any]],
    avals: Sequence[jax.ShapeDtypeStruct],
    boundaries: frozenset[str],
    axis_env: Mapping[str, int] | None = None,
) -> Traced:
    """Traces a function of flat arguments; calls that hold one of `boundaries` are written out.

    Raises:
      ValueError: if one of them stands inside control flow.
    """
    axes = None if axis_env is None else list(axis_env.items())
    closed = jax.make_jaxpr(fn, axis_env=axes)(*avals)
    if any(_inlines(eqn, boundaries) for eqn in _open(closed).eqns):
        # tracing the evaluation also gives every copy of a shared body variables of its own
        written_out = functools.partial(_evaluate, closed, boundaries)
        closed = jax.make_jaxpr(written_out, axis_env=axes)(*avals)
    jaxpr = _open(closed)
    for eqn in jaxpr.eqns:
        if eqn.primitive is not boundary_p:
            _refuse_inner(eqn, boundaries)
    return Traced(
        tuple(jaxpr.eqns),
        tuple(jaxpr.invars),
        tuple(jaxpr.constvars),
        tuple(closed.consts),
        tuple(jaxpr.outvars),
        jaxpr,
    )


def sub_jaxpr(source: Any, eqns: Sequence[jex.JaxprEqn], invars: Sequence[jex.Var], outvars: Sequence[Atom]) -> Any:
    """Some equations of a jaxpr as one of their own, without constants."""
    changes: dict[str, Any] = {
        "constvars": [],
        "invars": list(invars),
        "outvars": list(outvars),
        "eqns": list(eqns),
        "effects": frozenset().union(*(eqn.effects for eqn in eqns)) if eqns else frozenset(),
        "debug_info": source.debug_info.with_unknown_names(),
    }
    if issubclass(jex.Jaxpr, jex.ClosedJaxpr):  # jax >= 0.11 has the one class, which keeps constants
        changes["consts"] = []
    return source.replace(**changes)


def evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The values of a jaxpr of `sub_jaxpr`, inside a trace or outside."""
    return jax.core.eval_jaxpr(jaxpr, [], *args)


def compiled_params(eqn: Any) -> Mapping[str, Any]:
    """The parameters of an equation that decide what is compiled: not derivative rules, functions of one trace each."""
    name = eqn.primitive.name
    return {_CALLS[name]: eqn.params[_CALLS[name]]} if name in _ALWAYS_INLINE else eqn.params


def is_literal(atom: Atom) -> bool:
    """Whether an operand is a value instead of a variable."""
    return isinstance(atom, jex.Literal)


def inner_jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs directly inside an equation's parameter."""
    if isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr)):
        yield _open(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from inner_jaxprs(item)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _holds(eqn: Any, boundaries: frozenset[str]) -> Any | None:
    """The first boundary equation inside an equation's own jaxprs."""
    for value in eqn.params.values():
        for jaxpr in inner_jaxprs(value):
            for inner in jaxpr.eqns:
                if inner.primitive is boundary_p and inner.params["name"] in boundaries:
                    return inner
                if (found := _holds(inner, boundaries)) is not None:
                    return found
    return None


def _inlines(eqn: Any, boundaries: frozenset[str]) -> bool:
    name = eqn.primitive.name
    return name in _ALWAYS_INLINE or (name in _CALLS and _holds(eqn, boundaries) is not None)


def _refuse_inner(eqn: Any, boundaries: frozenset[str]) -> None:
    if (inner := _holds(eqn, boundaries)) is not None:
        raise ValueError(
            f"boundary {describe(inner.params['name'], inner.params['static'])} stands inside {eqn.primitive.name}: "
            "a function can only be split outside of control flow; unroll it, or leave the name out of `boundaries` "
            "to run it as a host callback"
        )


def _evaluate(closed: Any, boundaries: frozenset[str], *args: Any) -> list[Any]:
    """Evaluates a jaxpr equation by equation, the bodies of calls that must be written out included."""
    jaxpr = _open(closed)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        if _inlines(eqn, boundaries):
            body = eqn.params[_CALLS[eqn.primitive.name]]
            results = _evaluate(body, boundaries, *(read(atom) for atom in eqn.invars))
        else:
            inputs = list(dict.fromkeys(atom for atom in eqn.invars if not is_literal(atom)))
            results = evaluate(sub_jaxpr(jaxpr, [eqn], inputs, eqn.outvars), [values[var] for var in inputs])
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
